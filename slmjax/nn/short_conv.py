"""A gated convolution over the last few tokens, in the place of attention."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_kernels import Mask
from slmjax.nn.layer import Layer
from slmjax.nn.numerics import Cache
from slmjax.nn.parts import Flow, Mixer


@dataclass(frozen=True, kw_only=True)
class ShortConv(Mixer):
    """out(C * conv(B * x)): B, C and x are projections of the input, conv is causal and keeps channels apart.

    Liquid AI 2025 (LFM2), arXiv:2511.23404. Tokens of another segment, or of padding, count as 0.
    """

    label: ClassVar[str] = "conv"
    attended_width: ClassVar[int] = 0

    channels: int
    """Width of B, C and x"""
    taps: int = 3
    """Tokens that the convolution sees: this one and those before it"""
    bias: bool = False
    """Whether the projections and the convolution have biases"""

    def __post_init__(self):
        for name in ("channels", "taps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is not positive")

    @property
    def table_key(self) -> Hashable:
        return type(self)

    def table(self, positions: jax.Array) -> Any:
        """None: a convolution does not depend on positions, only on segments."""

    def init_cache(self, batch: int, length: int, dtype: str, codec: Cache) -> dict[str, jax.Array]:
        """The last inputs of the convolution, [B, taps - 1, channels], whatever the length."""
        return {"inputs": jnp.zeros((batch, self.taps - 1, self.channels), dtype)}

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D], and the cache with the inputs of the last tokens in layer `depth`."""
        width = x.shape[-1]
        b, c, value = (self._projected(layer, name, x) for name in ("b", "c", "x"))
        inputs = b * value
        if flow.cache is None:
            before = jnp.zeros((x.shape[0], self.taps - 1, self.channels), inputs.dtype)
        else:
            stack, at = flow.cache["inputs"], (flow.depth, 0, 0, 0)
            before = jax.lax.dynamic_index_in_dim(stack, flow.depth, keepdims=False).astype(inputs.dtype)
        extended = jnp.concatenate([before, inputs], axis=1)  # [B, taps - 1 + T, channels]
        if flow.cache is not None:
            last = extended[:, extended.shape[1] - (self.taps - 1) :].astype(stack.dtype)
            flow = flow._replace(cache={"inputs": jax.lax.dynamic_update_slice(stack, last[None], at)})
        y = c * layer.cast(self._convolved(layer, extended, flow.mask))
        shape, axes = (self.channels, width), ("mlp", "embed")
        return layer.linear("out", "btc,cd->btd", y, shape, axes, bias=self.bias, residual=True), flow

    def _projected(self, layer: Layer, name: str, x: jax.Array) -> jax.Array:
        return layer.linear(name, "btd,dc->btc", x, (x.shape[-1], self.channels), ("embed", "mlp"), bias=self.bias)

    def _convolved(self, layer: Layer, inputs: jax.Array, mask: Mask) -> jax.Array:
        """inputs [B, taps - 1 + T, channels] -> float32 [B, T, channels]. The last tap is that of the token itself."""
        weight = layer.cast(layer.matrix("taps", (self.channels, self.taps), ("mlp", "tap"))).astype(jnp.float32)
        length = mask.query_segments.shape[1]
        # Slots before the first one belong to no segment, not even to the segment 0 of padding.
        segments = jnp.pad(mask.key_segments, ((0, 0), (self.taps - 1, 0)), constant_values=-1)
        start = 0 if mask.start is None else mask.start
        parts = []
        for tap in range(self.taps):
            seen = jax.lax.dynamic_slice_in_dim(segments, start + tap, length, axis=1) == mask.query_segments
            part = jnp.where(seen[..., None], inputs[:, tap : tap + length], 0).astype(jnp.float32)
            parts.append(part * weight[:, tap])
        y = functools.reduce(jnp.add, parts)
        return y + layer.bias("taps_bias", (self.channels,), ("mlp",)) if self.bias else y
