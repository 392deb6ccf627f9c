"""Blocks: ways to connect a mixer, a feed-forward layer and norms to the residual stream."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from typing import ClassVar

import jax

from slmjax.nn.layer import Layer
from slmjax.nn.parts import FeedForward, Flow, Mixer, Norm


@dataclass(frozen=True, kw_only=True)
class AnyBlock(abc.ABC):
    """One layer of a model. Each subclass connects the parts in its own way."""

    mixer: Mixer
    mlp: FeedForward
    norm: Norm
    norms_stream: ClassVar[bool] = False
    """Whether the output of a norm becomes the residual stream, which undoes factors on what was added before"""
    branch_scale: float = 1.0
    """Factor on what a branch adds to the residual stream"""

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the auxiliary outputs that its parts add (`FeedForward.auxiliary`)."""
        return self.mlp.auxiliary

    def active(self, path: str) -> float:
        """The share of the parameter `path` (inside this block) that a token uses, for counting FLOPs."""
        part, _, name = path.partition("/")
        return self.mlp.active(name) if re.fullmatch(r"mlp(_\d+)?", part) else 1.0

    @abc.abstractmethod
    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """x [B, T, D] -> [B, T, D], and `flow` after these tokens."""

    def mixed(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """The mixer's output for x [B, T, D], [B, T, D], and `flow` after it."""
        return layer.child(self.mixer.label, self.mixer)(x, flow)

    def feed_forward(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        """The feed-forward layer's output for x [B, T, D], [B, T, D], and `flow` after it."""
        return layer.child("mlp", self.mlp)(x, flow)

    def normed(self, layer: Layer, name: str, x: jax.Array) -> jax.Array:
        """norm(x), the norm's parameters under this name."""
        return layer.child(name, self.norm)(x)

    def added(self, x: jax.Array, *branches: jax.Array) -> jax.Array:
        """x + branch_scale * branch, for each."""
        for y in branches:
            x = x + (y if self.branch_scale == 1.0 else y * self.branch_scale)
        return x


@dataclass(frozen=True, kw_only=True)
class Block(AnyBlock):
    """x + mixer(norm(x)), then x + mlp(norm(x)): pre-norm. Xiong et al. 2020, arXiv:2002.04745."""

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        y, flow = self.mixed(layer, self.normed(layer, f"{self.mixer.label}_norm", x), flow)
        x = self.added(x, y)
        y, flow = self.feed_forward(layer, self.normed(layer, "mlp_norm", x), flow)
        return self.added(x, y), flow


@dataclass(frozen=True, kw_only=True)
class PostNorm(AnyBlock):
    """norm(x + mixer(x)), then norm(x + mlp(x)). Vaswani et al. 2017, arXiv:1706.03762."""

    norms_stream: ClassVar[bool] = True

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        y, flow = self.mixed(layer, x, flow)
        x = self.normed(layer, f"{self.mixer.label}_norm", self.added(x, y))
        y, flow = self.feed_forward(layer, x, flow)
        return self.normed(layer, "mlp_norm", self.added(x, y)), flow


@dataclass(frozen=True, kw_only=True)
class NormedStream(AnyBlock):
    """n + mixer(n) with n = norm(x), then the same with the mlp: the norm of the stream is what goes on. An option of
    BLOOM's code, `apply_residual_connection_post_layernorm`; Le Scao et al. 2022, arXiv:2211.05100, do not use it."""

    norms_stream: ClassVar[bool] = True

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        x = self.normed(layer, f"{self.mixer.label}_norm", x)
        y, flow = self.mixed(layer, x, flow)
        x = self.normed(layer, "mlp_norm", self.added(x, y))
        y, flow = self.feed_forward(layer, x, flow)
        return self.added(x, y), flow


@dataclass(frozen=True, kw_only=True)
class Sandwich(AnyBlock):
    """x + norm(mixer(norm(x))), then the same with the mlp. Ding et al. 2021, arXiv:2105.13290; Gemma 2."""

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        label = self.mixer.label
        y, flow = self.mixed(layer, self.normed(layer, f"{label}_norm", x), flow)
        x = self.added(x, self.normed(layer, f"{label}_post_norm", y))
        y, flow = self.feed_forward(layer, self.normed(layer, "mlp_norm", x), flow)
        return self.added(x, self.normed(layer, "mlp_post_norm", y)), flow


@dataclass(frozen=True, kw_only=True)
class PostBranch(AnyBlock):
    """x + norm(mixer(x)), then x + norm(mlp(x)). OLMo 2, arXiv:2501.00656, section 2.1."""

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        y, flow = self.mixed(layer, x, flow)
        x = self.added(x, self.normed(layer, f"{self.mixer.label}_post_norm", y))
        y, flow = self.feed_forward(layer, x, flow)
        return self.added(x, self.normed(layer, "mlp_post_norm", y)), flow


@dataclass(frozen=True, kw_only=True)
class Parallel(AnyBlock):
    """x + mixer(norm(x)) + mlp(norm'(x)). Wang & Komatsuzaki 2021 (GPT-J); two norms as in GPT-NeoX."""

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        y, flow = self.mixed(layer, self.normed(layer, f"{self.mixer.label}_norm", x), flow)
        z, flow = self.feed_forward(layer, self.normed(layer, "mlp_norm", x), flow)
        return self.added(x, y, z), flow


@dataclass(frozen=True, kw_only=True)
class ParallelShared(AnyBlock):
    """x + mixer(norm(x)) + mlp(norm(x)), with one norm for both. Wang & Komatsuzaki 2021 (GPT-J)."""

    def __call__(self, layer: Layer, x: jax.Array, flow: Flow) -> tuple[jax.Array, Flow]:
        read = self.normed(layer, f"{self.mixer.label}_norm", x)
        y, flow = self.mixed(layer, read, flow)
        z, flow = self.feed_forward(layer, read, flow)
        return self.added(x, y, z), flow
