"""`Encoder`, the one class of encoders: every token sees all others of its document. BERT and its descendants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.errors import UserError, positive
from slmjax.losses.masked_lm import Masking
from slmjax.models.assembly import Assembly, Carry, applied, run
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.compute import Compute
from slmjax.nn.encoder_embedding import EncoderEmbedding
from slmjax.nn.heads import Head
from slmjax.nn.initial import Initial, Normal
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Numerics
from slmjax.nn.parts import Norm
from slmjax.types import Batch, Key, Model, Output, Params, Special

CANNOT = (
    "this model is an encoder, which reads a whole text at once and cannot generate one; "
    "use `slmjax embed` for a text's vector, or a decoder (llama, gpt2) to generate"
)


@dataclass(frozen=True, kw_only=True)
class Encoder(Assembly):
    """An embedding under a norm, `pattern` repeated `repeats` times and the stages of `tail`, and a head."""

    causal: ClassVar[bool] = False

    head: Head
    """Output layer: from the last layer to what the model predicts (tokens, labels, a vector)"""
    embed_norm: Norm
    """Norm of the embedding, before the first block"""
    types: int = 0
    """Number of token types (2: the first and the second text of a pair); 0: the model has no table of them"""
    trigram: int | None = None
    """Width of the token table, if the vectors of each token, the next and the one before are concatenated and
    projected to the model's width (MobileBERT); None: the table is as wide as the model"""
    initial: Initial = Normal()  # noqa: RUF009
    """Initial values. A norm follows each addition to the residual stream, so no matrix needs smaller values"""

    def __post_init__(self):
        super().__post_init__()
        if self.types < 0:
            raise UserError(f"model.types: {self.types} is negative; 0 for none")
        positive(**{"model.trigram": self.trigram})

    def build(self, compute: Compute = Compute(), numerics: Numerics = Numerics()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays: `numerics` is what they compute, `compute` how.

        `apply` takes `types`, int32 [B, T], where there are token types; by default all are 0.
        """
        stacks = {collect: self._stack(compute, numerics, collect) for collect in (False, True)}
        head = self._head(compute, numerics)

        def init(key) -> Params:
            return nn.meta.unbox(self.drawn(key))

        def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False, types=None) -> Output:
            if cache is not None:
                raise UserError(CANNOT)
            inside = {name: value for name, value in params.items() if name != "head"}
            return applied(self, stacks[collect], inside, tokens, positions, segment_ids, types, collect=collect)

        def unembed(params, hidden):
            return head.apply({"params": params.get("head", {})}, hidden, params["embed"]["table"])

        def init_cache(batch, length):
            raise UserError(CANNOT)

        return Model(
            init=init,
            apply=apply,
            unembed=unembed,
            axes=self.axes(),
            init_cache=init_cache,
            context=self.context,
            vocab=self.vocab,
            rules=self.rules(),
        )

    def drawn(self, key: jax.Array) -> Params:
        """Initial parameters, each in its `Declared`."""
        one = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on the batch
        below, above = jax.random.split(key)
        params: dict[str, Any] = dict(self._stack(Compute(), Numerics()).init(below, one, one, one, None)["params"])
        table = params["embed"]["table"].value
        of_head = self._head(Compute(), Numerics()).init(above, jnp.zeros((1, self.width)), table)
        return {**params, "head": of_head["params"]} if of_head else params

    def logit_products(self) -> int:
        """The head's multiply-adds."""
        return self.head.logit_products(self.vocab, self.width)

    @property
    def example(self) -> str:
        return "inspect {}" if self.labels else 'embed {} --text "A sentence."'

    @property
    def predicts_tokens(self) -> bool:
        return self.head.predicts_tokens

    @property
    def labels(self) -> tuple[str, ...]:
        return self.head.names

    @property
    def reads_end(self) -> bool:
        return True

    def evaluation_batch(self, batch: Batch, key: Key, special: Special) -> Batch:
        """The batch with tokens masked, as in BERT's training.

        Raises:
            UserError: the head does not predict tokens.
        """
        if not self.predicts_tokens:
            raise UserError(
                f"this encoder's head, {type(self.head).__name__}, predicts no tokens: there is no loss to evaluate; "
                "`slmjax embed` gives vectors"
            )
        return Masking()(batch, key, vocab=self.vocab, special=special)

    def _stack(self, compute: Compute, numerics: Numerics, collect: bool = False) -> Layer:
        stack = EncoderStack(encoder=self, collect=collect)
        return Layer(spec=stack, compute=compute, initial=self.initial, numerics=numerics)

    def _head(self, compute: Compute, numerics: Numerics) -> Layer:
        return Layer(spec=self.head, compute=compute, initial=self.initial, numerics=numerics, prefix="head")


@dataclass(frozen=True, kw_only=True)
class EncoderStack:
    """The forward pass, from tokens to the head's input."""

    encoder: Encoder
    collect: bool = False

    def __call__(
        self,
        layer: Layer,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        types: jax.Array | None,
    ) -> Output:
        e = self.encoder
        embedding = EncoderEmbedding(
            vocab=e.vocab, width=e.width, context=e.context, norm=e.embed_norm, types=e.types, trigram=e.trigram
        )
        x = layer.child("embed", embedding)(tokens, positions, segment_ids, types)
        nothing = tuple((None,) * len(stage.pattern) for stage in e.stages)
        carry = Carry(x, nothing, {}, e.no_auxiliary(segment_ids))
        after, streams = run(layer, e.stages, positions, Mask.of_rows(segment_ids), carry, self.collect)
        return Output(
            hidden=after.x,
            blocks=jnp.concatenate([*streams, after.x[None]]) if self.collect else None,
            auxiliary=after.auxiliary,
        )
