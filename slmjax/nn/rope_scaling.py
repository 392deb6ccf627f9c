"""Rotary frequencies for contexts longer than a model was first trained on."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from slmjax.errors import UserError, positive


class RopeScaling(abc.ABC):
    """Changes the frequencies of rotary positions."""

    @abc.abstractmethod
    def frequencies(self, powers: np.ndarray, positions: Any, theta: float) -> Any:
        """powers float32 [K/2], theta^(2i/K); positions int32 [B, T] -> radians a token, float32 [K/2]."""

    @property
    def magnitude(self) -> float:
        """Factor on sines and cosines."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """All positions divided by `factor`. Chen et al. 2023, arXiv:2306.15595."""

    factor: float

    def __post_init__(self):
        positive(factor=self.factor)

    def frequencies(self, powers: np.ndarray, positions: Any, theta: float) -> np.ndarray:
        return np.float32(1) / powers / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Stretches the slow rotations so that a model trained at `original_context` reaches further. Llama 3.1, 2024.

    A wavelength (in tokens) above original_context/low is divided in frequency by `factor`, one below
    original_context/high is kept, and those between are blended.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        positive(factor=self.factor, low=self.low, high=self.high, original_context=self.original_context)
        if self.low >= self.high:
            raise UserError(f"position.scaling: low = {self.low} is not below high = {self.high}")

    def frequencies(self, powers: np.ndarray, positions: Any, theta: float) -> np.ndarray:
        frequencies = np.float32(1) / powers
        wavelength = np.float32(2 * math.pi) / frequencies
        blend = (np.float32(self.original_context) / wavelength - np.float32(self.low)) / np.float32(
            self.high - self.low
        )
        blend = np.clip(blend, 0, 1)
        return ((1 - blend) * frequencies / np.float32(self.factor) + blend * frequencies).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class LongRope(RopeScaling):
    """A factor for each frequency: one set for sequences up to `original_context` tokens, one for longer ones.

    Ding et al. 2024, arXiv:2402.13753. Which set is used is decided by the largest position of the batch, as
    `transformers` decides; sines and cosines grow by sqrt(1 + ln(factor) / ln(original_context)).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    factor: float
    """Full context / original_context"""
    attention_factor: float | None = None
    """Factor on sines and cosines; None: the formula above"""

    def __post_init__(self):
        positive(factor=self.factor, attention_factor=self.attention_factor)
        for factor in (*self.short, *self.long):
            positive(factor=factor)
        if self.original_context < 2:
            raise UserError(f"position.scaling.original_context: {self.original_context}; expected tokens, at least 2")
        if len(self.short) != len(self.long):
            raise UserError(f"position.scaling: {len(self.short)} short factors but {len(self.long)} long ones")

    def frequencies(self, powers: np.ndarray, positions: Any, theta: float) -> Any:
        if len(powers) != len(self.short):
            raise UserError(f"position.scaling: {len(self.short)} factors; {len(powers)} channel pairs are rotated")
        short, long = (np.float32(1) / (np.asarray(x, np.float32) * powers) for x in (self.short, self.long))
        return jnp.where(jnp.max(positions) + 1 > self.original_context, long, short)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


@dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """Fast rotations stay, slow ones are divided by `factor`, those between are blended; and attention grows sharper.
    Peng et al. 2023, arXiv:2309.00071, as `transformers` computes it (Qwen2.5, Qwen3, SmolLM3 beyond their context).

    Fast is what turns more than `fast` times within `original_context` tokens, slow less than `slow` times: between
    the two the blend is linear in the channel pair. Sines and cosines grow by 0.1 ln(factor) + 1.
    """

    factor: float
    """Full context / original_context"""
    original_context: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    """Whether the blend begins and ends at whole channel pairs"""
    attention_factor: float | None = None
    """Factor on sines and cosines; None: the formula above"""
    mscale: float | None = None
    """With `mscale_all_dim`: the factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)"""
    mscale_all_dim: float | None = None

    def __post_init__(self):
        positive(factor=self.factor, fast=self.fast, slow=self.slow, attention_factor=self.attention_factor)
        positive(original_context=self.original_context)
        if self.slow > self.fast:
            raise UserError(f"position.scaling: slow = {self.slow} is above fast = {self.fast}")

    def frequencies(self, powers: np.ndarray, positions: Any, theta: float) -> np.ndarray:
        if not theta > 1:
            raise UserError(f"position.theta: {theta}; with YaRN the base has to be above 1")
        width = 2 * len(powers)
        low, high = (
            width * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high  # a step, where no pair lies between
        pairs = np.arange(len(powers), dtype=np.float32)
        kept = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
        slow, fast = np.float32(1) / (np.float32(self.factor) * powers), np.float32(1) / powers
        return (slow * (1 - kept) + fast * kept).astype(np.float32)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0
