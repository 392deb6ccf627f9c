"""The one encoder, assembled from values: every token sees all others of its document. BERT and its descendants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.errors import UserError, positive
from slmjax.losses.masked_lm import Masking
from slmjax.models.assembly import Assembly, run
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.compute import Compute
from slmjax.nn.encoder_embedding import EncoderEmbedding
from slmjax.nn.heads import Head
from slmjax.nn.layer import Initial, Layer
from slmjax.nn.parts import Norm
from slmjax.types import Batch, Key, Model, Output, Params, Special

CANNOT = (
    "this model is an encoder: it sees a whole text at once and continues none; "
    "`slmjax embed` gives a text's vector, a decoder (llama, gpt2) generates"
)


@dataclass(frozen=True, kw_only=True)
class Encoder(Assembly):
    """An embedding under a norm, `pattern` repeated `repeats` times and the stages of `tail`, and a head."""

    whole_text: ClassVar[bool] = False

    head: Head
    """From the last layer to what the model tells: words, labels, a vector"""
    embed_norm: Norm
    types: int = 0
    """Token types that are told apart (2: the first and the second text of a pair); without, there is no table"""
    trigram: int | None = None
    """Width of the token table where a token's vector, the next one's and that before are joined and projected
    (MobileBERT); None: the table is as wide as the model"""
    initial: Initial = Initial()  # noqa: RUF009
    """Initial values: `std` for all matrices, since norms after each branch keep the stream from growing"""

    def __post_init__(self):
        super().__post_init__()
        if self.types < 0:
            raise UserError(f"model.types: {self.types} is negative; 0 for none")
        positive(**{"model.trigram": self.trigram})

    def build(self, compute: Compute = Compute()) -> Model:  # noqa: B008
        """Pure functions over a nested dict of float32 arrays, computed as `compute` says.

        `apply` takes `types`, int32 [B, T], where there are token types; by default all are 0.
        """
        stacks = {collect: self._stack(compute, collect) for collect in (False, True)}
        head = Layer(spec=self.head, compute=compute, initial=self.initial)

        def init(key) -> Params:
            return nn.meta.unbox(self.drawn(key))

        def apply(params, tokens, positions, segment_ids, *, cache=None, collect=False, types=None) -> Output:
            if cache is not None:
                raise UserError(CANNOT)
            inside = {name: value for name, value in params.items() if name != "head"}
            output: Any = stacks[collect].apply({"params": inside}, tokens, positions, segment_ids, types)
            return output

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
        )

    def drawn(self, key: jax.Array) -> Params:
        """Initial parameters, each in its `Declared`."""
        one = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on the batch
        below, above = jax.random.split(key)
        params: dict[str, Any] = dict(self._stack(Compute()).init(below, one, one, one, None)["params"])
        table = params["embed"]["table"].value
        head = Layer(spec=self.head, compute=Compute(), initial=self.initial)
        found = head.init(above, jnp.zeros((1, self.width)), table)
        return {**params, "head": found["params"]} if found else params

    def logit_products(self) -> int:
        """Those of the head."""
        return self.head.logit_products(self.vocab, self.width)

    @property
    def example(self) -> str:
        return "inspect {}" if self.labels else 'embed {} --text "A sentence."'

    @property
    def tells_words(self) -> bool:
        return self.head.words

    @property
    def labels(self) -> tuple[str, ...]:
        return self.head.names

    @property
    def reads_end(self) -> bool:
        return True

    def asked(self, batch: Batch, key: Key, special: Special) -> Batch:
        """Masked words, as BERT is trained on.

        Raises:
            UserError: the head tells something else.
        """
        if not self.tells_words:
            raise UserError(
                f"this encoder's head, {type(self.head).__name__}, tells no words: there is no loss to evaluate; "
                "`slmjax embed` gives vectors"
            )
        return Masking()(batch, key, vocab=self.vocab, special=special)

    def _stack(self, compute: Compute, collect: bool = False) -> Layer:
        return Layer(spec=EncoderStack(encoder=self, collect=collect), compute=compute, initial=self.initial)


@dataclass(frozen=True, kw_only=True)
class EncoderStack:
    """The forward pass, from tokens to what the head reads."""

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
        x, _, streams = run(layer, e.stages, positions, Mask(segment_ids, segment_ids), (x, nothing, {}), self.collect)
        return Output(hidden=x, blocks=jnp.concatenate([*streams, x[None]]) if self.collect else None)
