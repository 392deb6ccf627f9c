"""How a model is computed: precision, kernels, recomputation to save memory.

Two `Compute` values give the same function up to rounding, so they are not part of an experiment's identity. Settings
that change the function, such as quantized activations, are in `numerics.Numerics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slmjax.errors import UserError
from slmjax.nn.attention_cpu import cpu_attention
from slmjax.nn.attention_kernels import cudnn_attention, reference_attention
from slmjax.nn.einsum_cpu import cpu_einsum
from slmjax.nn.processor import processor
from slmjax.platform import jaxlib_version


def einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The kernel of every contraction of activations with parameters. Inputs and output have the compute dtype."""
    return jnp.einsum(equation, x, weight)


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """Keep every intermediate value for the backward pass: the fastest, the most memory."""

    def __call__(self, module: Any, *, in_loop: bool) -> Any:
        return module


@dataclass(frozen=True, kw_only=True)
class Remat:
    """Recompute each block in the backward pass. Chen et al. 2016, arXiv:1604.06174.

    The block's input is kept and, with `keep_matmuls`, the results of matrix products with parameters (not those inside
    attention), which would take the most time to recompute.
    """

    keep_matmuls: bool = False

    def __call__(self, module: Any, *, in_loop: bool) -> Any:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.keep_matmuls else None
        # Outside a loop XLA would merge the recomputation with the original, unless prevent_cse is set.
        return nn.remat(module, policy=policy, prevent_cse=not in_loop)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Parameters stay float32; activations and matrix products have `dtype`; reductions are float32."""

    dtype: str = "float32"
    """float32 | bfloat16"""
    attention: Callable = reference_attention
    """(q [B,T,H,K], k [B,S,G,K], v [B,S,G,K], mask: Mask, rule: Scores) -> [B,T,H,K]; see nn/attention_kernels.py"""
    einsum: Callable = einsum
    """(equation, x, weight) -> y: the kernel of every contraction with a parameter"""
    remat: KeepAll | Remat = KeepAll()
    """What the backward pass recomputes"""
    unroll: int | None = 1
    """Layers per iteration of the scan over layers; None: all layers, without a loop, which takes longer to compile"""

    micro_size: int | None = None
    """Least tokens times width of a micro-batch on each device: a batch is cut into as many micro-batches as this
    allows (train/micro.py), for less memory, and for speed where the working set then fits the processor's cache; None:
    into `Experiment.accumulate` micro-batches"""

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute.dtype: {self.dtype!r} is not float32 or bfloat16")
        if self.unroll is not None and self.unroll < 1:
            raise UserError(f"compute.unroll: {self.unroll} is not a positive number of layers, or None for all")
        if self.micro_size is not None and self.micro_size < 1:
            raise UserError(f"compute.micro_size: {self.micro_size} is not a positive number, or None")

    def micro_tokens(self, width: int) -> int | None:
        """The least tokens of a micro-batch on each device, in a model of this width; None without `micro_size`."""
        return None if self.micro_size is None else math.ceil(self.micro_size / width)


def cpu_dtype(bfloat16: bool, jaxlib: tuple[int, ...]) -> str:
    """The dtype for a CPU on which nothing has been measured: bfloat16 if the processor has instructions for it
    (`Processor.bfloat16`) and jaxlib (major, minor) uses them: before 0.12 it converts to float32 first."""
    return "bfloat16" if bfloat16 and jaxlib >= (0, 12) else "float32"


def for_cpu(dtype: str, *, einsum: Callable = cpu_einsum, attention: Callable = cpu_attention) -> Compute:
    """The settings for a CPU with this dtype and these kernels; runs/probe.py measures which are the fastest."""
    return Compute(dtype=dtype, attention=attention, einsum=einsum, unroll=8, micro_size=2**18)


def for_backend(backend: str) -> Compute:
    """The fastest known settings for `cpu`, `gpu` or `tpu` (`jax.default_backend()`). Nothing is measured: the dtype on
    a CPU follows from its instructions."""
    if backend == "cpu":
        return for_cpu(cpu_dtype(processor().bfloat16, jaxlib_version()))
    return {
        "gpu": Compute(dtype="bfloat16", attention=cudnn_attention),
        "tpu": Compute(dtype="bfloat16"),
    }.get(backend, Compute())
