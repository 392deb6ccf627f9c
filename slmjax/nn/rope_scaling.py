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
    def frequencies(self, powers: np.ndarray, positions: Any) -> Any:
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

    def frequencies(self, powers: np.ndarray, positions: Any) -> np.ndarray:
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

    def frequencies(self, powers: np.ndarray, positions: Any) -> np.ndarray:
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

    def frequencies(self, powers: np.ndarray, positions: Any) -> Any:
        if len(powers) != len(self.short):
            raise UserError(f"position.scaling: {len(self.short)} factors; {len(powers)} channel pairs are rotated")
        short, long = (np.float32(1) / (np.asarray(x, np.float32) * powers) for x in (self.short, self.long))
        return jnp.where(jnp.max(positions) + 1 > self.original_context, long, short)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))
