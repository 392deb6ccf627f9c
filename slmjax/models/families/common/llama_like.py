"""What Llama and families like it have in common: sizes, a layer, rows, fields of config.json.

Grouped-query attention, rotary positions, a gated MLP, and norms in some order. The file of a family says where it
differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slmjax.errors import UserError
from slmjax.models.arrange import layers_of
from slmjax.models.decoder import Block, Decoder
from slmjax.models.families.common.config_fields import (
    NUMBER,
    Fields,
    Names,
    activation_name,
    labels_from_config,
    labels_to_config,
)
from slmjax.models.families.common.rope_fields import rope_from_config
from slmjax.models.families.common.rows import Row, attention_rows, dense_rows, norm_rows
from slmjax.nn.attention import Attention
from slmjax.nn.block import AnyBlock
from slmjax.nn.heads import Head, LastTokenScore
from slmjax.nn.mlp import GatedMLP, silu
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.nn.parts import Norm
from slmjax.nn.position import Position, Rope


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model like Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    """None: as many as `heads`"""
    hidden: int
    """Width of the gated MLP"""
    vocab: int
    context: int
    tied: bool = False
    head_dim: int | None = None
    """None: width / heads"""
    eps: float = 1e-5
    """Epsilon of all norms"""
    activation: Callable = silu
    head: Head | None = None
    """Replaces the output table, for a classifier; None: a language model"""

    def block(
        self, position: Position, norm: Norm, *, kind: type[AnyBlock] = Block, mlp_bias: bool = False, **attention: Any
    ) -> AnyBlock:
        """One layer. `attention`: further fields of `Attention`."""
        mixer = Attention(
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            head_dim=self.width // self.heads if self.head_dim is None else self.head_dim,
            position=position,
            **attention,
        )
        mlp = GatedMLP(hidden=self.hidden, activation=self.activation, bias=mlp_bias)
        return kind(mixer=mixer, mlp=mlp, norm=norm)

    def each(self, windows: Sequence[int | None]) -> Sequence[int | None]:
        """The window of each layer, if `windows` has one for each layer or a single one for all."""
        return list(windows) * (self.layers if len(windows) == 1 else 1)

    def decoder(self, blocks: Sequence[AnyBlock], **options: Any) -> Decoder:
        """A decoder of these layers; its final norm is the first layer's. `options`: further fields of `Decoder`."""
        laid_out = layers_of(blocks)
        return Decoder(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            tied=self.tied,
            final_norm=blocks[0].norm,
            head=self.head,
            **laid_out,
            **options,
        )


_LAYER = "model.layers.{}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"

TABLES = (
    Row("embed/table", "model.embed_tokens.weight", "v d -> v d"),
    *norm_rows("final_norm", "model.norm"),
    Row("unembed/table", "lm_head.weight", "v d -> v d"),
    Row("head/score", "score.weight", "x d -> d x"),
)
PRE_NORMS = (
    *norm_rows("layers/attn_norm", f"{_LAYER}.input_layernorm"),
    *norm_rows("layers/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
)
SANDWICH_NORMS = (
    *norm_rows("layers/attn_norm", f"{_LAYER}.input_layernorm"),
    *norm_rows("layers/attn_post_norm", f"{_LAYER}.post_attention_layernorm"),
    *norm_rows("layers/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
    *norm_rows("layers/mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
)
"""A block with norms only after its branches has the second and the fourth"""
ATTENTION = attention_rows(_ATTENTION, "q_proj", "k_proj", "v_proj", "o_proj")
QK_NORMS = (
    *norm_rows("layers/attn/q_norm", f"{_ATTENTION}.q_norm"),
    *norm_rows("layers/attn/k_norm", f"{_ATTENTION}.k_norm"),
)
"""One gain for all heads"""
MLP = (
    *dense_rows("layers/mlp/gate", f"{_MLP}.gate_proj"),
    *dense_rows("layers/mlp/up", f"{_MLP}.up_proj"),
    *dense_rows("layers/mlp/down", f"{_MLP}.down_proj"),
)
LLAMA = (*TABLES, *PRE_NORMS, *ATTENTION, *MLP)
"""Parameters as LlamaForCausalLM saves them"""


WORDS, LABELS = "ForCausalLM", "ForSequenceClassification"
SCORED = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "StableLm", "SmolLM3")
"""Prefixes of classes that `transformers` also has as sequence classifiers"""


class Common(NamedTuple):
    """The config.json fields of a decoder that all these families have in common, and the parts they describe."""

    config: dict[str, Any]
    mixers: tuple[Attention, ...]
    """Attention of each layer"""
    mlp: GatedMLP
    """MLP of the first layer"""
    rope: Rope
    """Positions of the first layer that has rotary positions"""


def common_config(
    decoder: Decoder,
    architecture: str,
    model_type: str,
    *,
    eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    head_dim: bool = True,
) -> Common | None:
    """The fields that `sizes_from` reads; None if a part of a layer is of another class. `exact` checks whether these
    fields describe the decoder exactly.

    Args:
        architecture: the language-model class; for a classifier the corresponding classifier class is written.
        eps, activation: the names of these fields.
        head_dim: whether the class has that field.
    """
    mixers = tuple(block.mixer for block in decoder.blocks() if isinstance(block.mixer, Attention))
    ropes = [mixer.position for mixer in mixers if isinstance(mixer.position, Rope)]
    mlp, norm = decoder.pattern[0].mlp, decoder.pattern[0].norm
    if len(mixers) < decoder.layers or not ropes or not isinstance(mlp, GatedMLP):
        return None
    if not isinstance(norm, (RMSNorm, LayerNorm)) or activation_name(mlp.activation) is None:
        return None
    labels: dict[str, Any] = {}
    if decoder.head is not None:
        if not isinstance(decoder.head, LastTokenScore) or architecture.removesuffix(WORDS) not in SCORED:
            return None
        architecture, labels = architecture.replace(WORDS, LABELS), labels_to_config(decoder.labels)
    config = {
        **Names(activation=activation).written(decoder, architecture, model_type, mixers[0].heads, mlp),
        "num_key_value_heads": mixers[0].kv_heads,
        **({"head_dim": mixers[0].head_dim} if head_dim else {}),
        eps: norm.eps,
        "tie_word_embeddings": decoder.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        **labels,
    }
    return Common(config, mixers, mlp, ropes[0])


def sizes_from(fields: Fields, defaults: Sizes, *, eps: str = "rms_norm_eps", activation: str = "hidden_act") -> Sizes:
    """Sizes from the fields that `common_config` writes; `defaults` are those of the class."""
    common = Names(activation=activation).read(
        fields,
        layers=defaults.layers,
        width=defaults.width,
        heads=defaults.heads,
        hidden=defaults.hidden,
        vocab=defaults.vocab,
        context=defaults.context,
        activation=activation_name(defaults.activation) or "",
    )
    return Sizes(
        **common,
        kv_heads=fields.nullable("num_key_value_heads", int, defaults.kv_heads),
        head_dim=fields.nullable("head_dim", int, defaults.head_dim),
        tied=fields.take("tie_word_embeddings", bool, defaults.tied),
        eps=fields.take(eps, NUMBER, defaults.eps),
        head=_head(fields.config),
    )


def _head(config: Mapping[str, Any]) -> Head | None:
    """The head of the class that a config.json names; None for a language model."""
    name = str((config.get("architectures") or [""])[0])
    known = name.removesuffix(LABELS) in SCORED and name.endswith(LABELS)
    return LastTokenScore(labels=labels_from_config(config)) if known else None


def divided(sizes: Sizes) -> Sizes:
    """Checks sizes of classes whose head_dim is always width / heads.

    Raises:
        UserError: head_dim is another number.
    """
    if sizes.width % sizes.heads or sizes.head_dim not in (None, sizes.width // sizes.heads):
        raise UserError(
            f"config.json: hidden_size = {sizes.width} is not {sizes.heads} heads (num_attention_heads) of head_dim = "
            f"{sizes.head_dim or sizes.width // sizes.heads}, as this model needs"
        )
    return sizes


def whole_rope(fields: Fields, context: int, theta: float = 1e4) -> Rope:
    """Rotary positions that rotate all channels of a head.

    Raises:
        UserError: they rotate a part of each head, or as `rope_from_config`.
    """
    rope = rope_from_config(fields, theta=theta, context=context)
    if rope.fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor = {rope.fraction} is not supported; only 1.0 is")
    return rope


def layer_windows(fields: Fields, length: int | None, default: Sequence[bool]) -> tuple[int | None, ...]:
    """The window of each layer by `layer_types`: `length`, or None for full attention.

    Args:
        default: whether each layer has a window if the field is absent.

    Raises:
        UserError: the field does not list every layer, has an unknown type, or has a window although `length` is None.
    """
    given = fields.take("layer_types", (list, tuple), None)
    names = [_kind(slides) for slides in default] if given is None else given
    if len(names) != len(default):
        raise UserError(f"config.json: layer_types names {len(names)} layers; num_hidden_layers = {len(default)}")
    if unknown := [x for x in names if x not in (_kind(True), _kind(False))]:
        raise UserError(f"config.json: layer_types has {unknown[0]!r}; expected {_kind(True)} or {_kind(False)}")
    if _kind(True) in names and length is None:
        raise UserError(f"config.json: some layers are {_kind(True)!r}, but sliding_window is not set")
    return tuple(length if name == _kind(True) else None for name in names)


def _kind(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def window_in_use(fields: Fields, default: int | None) -> int | None:
    """`sliding_window` if `use_sliding_window` is true, else None."""
    used, length = fields.take("use_sliding_window", bool, False), fields.nullable("sliding_window", int, default)
    return length if used else None


def windows_to_config(mixers: Sequence[Attention]) -> dict[str, Any]:
    """The fields that `window_in_use` and `layer_windows` read; all windows are assumed to equal the first."""
    lengths = [mixer.window for mixer in mixers if mixer.window is not None]
    return {
        "use_sliding_window": bool(lengths),
        "sliding_window": lengths[0] if lengths else None,
        "layer_types": layer_type_names(mixers),
    }


def layer_type_names(mixers: Sequence[Attention]) -> list[str]:
    """The field `layer_types` for these layers."""
    return [_kind(mixer.window is not None) for mixer in mixers]
