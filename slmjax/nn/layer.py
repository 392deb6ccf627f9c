"""`Layer`, the only Linen module: it provides a part (`RMSNorm(...)`, `Attention(...)`) with parameters and precision.

A part of a model is a frozen dataclass whose `__call__(layer, x, ...)` is its whole computation. `layer` declares the
part's parameters and creates its children, so the code states shapes, initial values and logical axes once, where a
parameter is used.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from slmjax.axes import STACKED
from slmjax.nn.compute import Compute
from slmjax.nn.encoded import Encoded, Weight, contraction, rows, values
from slmjax.nn.initial import Initial, Role
from slmjax.nn.numerics import Numerics

Axes = tuple[str | None, ...]
"""A name for each dimension of a parameter (axes.py), or None"""


COLLECTED = "collected"
"""Name of the Flax collection of the arrays that layers keep (`Layer.collected`)"""


class Declared(nn.LogicallyPartitioned):
    """A parameter as `init` creates it: the array, its logical axes (`names`), and its initial distribution as text."""

    initial: str = struct.field(pytree_node=False, default="")


class Layer(nn.Module):
    """The module of one part, `spec`: calling it calls the part with this layer as first argument."""

    spec: Any
    compute: Compute
    initial: Initial
    numerics: Numerics = Numerics()
    branches: int = 1
    """`initial.Role.branches`"""
    prefix: str = ""
    """Path of its parameters in those of the model, if it is applied separately from the model (`head`)"""

    @nn.compact
    def __call__(self, *args):
        return self.spec(self, *args)

    def child(self, name: str, spec: Any) -> Layer:
        """The layer of another part, with parameters under `name`; call it with the part's arguments."""
        return Layer(spec=spec, name=name, **self.inherited)

    @property
    def inherited(self) -> dict[str, Any]:
        """The fields that a child takes from its parent."""
        names = ("compute", "initial", "numerics", "branches", "prefix")
        return {name: getattr(self, name) for name in names}

    def path_of(self, name: str) -> str:
        """The path of a parameter of this layer in the tree of parameters."""
        return "/".join([*filter(None, [self.prefix]), *self.path, name])

    def linear(
        self, name: str, equation: str, x: jax.Array, shape: tuple[int, ...], axes: Axes,
        *, bias: bool = False, residual: bool = False,
    ) -> jax.Array:  # fmt: skip
        """`einsum(equation, x, weight)`, plus a bias, in the compute dtype.

        Declares the weight `name` and the bias `{name}_bias`, whose dimensions are those of the weight that the output
        has too.

        Example: `layer.linear("up", "btd,df->btf", x, (width, hidden), ("embed", "mlp"))`.

        Args:
            equation: a letter for each dimension of x, of the weight, and of the output.
            shape, axes: of the weight.
            residual: whether the output is added to the residual stream.
        """
        inputs, _, out = equation.partition("->")
        letters = inputs.rpartition(",")[2]
        summed = [
            n for letter, n, axis in zip(letters, shape, axes, strict=True) if letter not in out and axis not in STACKED
        ]
        weight = self._matrix(name, shape, axes, fan_in=math.prod(summed), residual=residual)
        y = self.product(self.path_of(name), equation, x, weight)
        if not bias:
            return y
        kept = [i for i, letter in enumerate(letters) if letter in out]
        b = self.bias(f"{name}_bias", tuple(shape[i] for i in kept), tuple(axes[i] for i in kept))
        # The bias is added in float32 so that its gradient, a sum over all tokens, is in float32 too.
        return self.cast(y.astype(jnp.float32) + b)

    def product(self, path: str, equation: str, x: jax.Array, weight: Weight) -> jax.Array:
        """`einsum(equation, x, weight)` in the compute dtype, rounded as `numerics` defines.

        Args:
            path: the path of the weight in the tree of parameters.
        """
        einsum = contraction(self.compute.einsum)
        return self.numerics.product(path, equation, self.cast(x), weight.astype(self.compute.dtype), einsum)

    def collected(self, **arrays: jax.Array) -> None:
        """Keeps arrays for the caller of `Model.apply(..., collect=True)`; otherwise this does nothing."""
        for name, x in arrays.items():
            self.sow(COLLECTED, name, x, init_fn=_nothing, reduce_fn=_newest)

    def matrix(
        self, name: str, shape: tuple[int, ...], axes: Axes, *, fan_in: int | None = None, residual: bool = False
    ) -> jax.Array:
        """A float32 parameter with random initial values, for other uses than `linear` and `looked_up`. `fan_in`,
        `residual`: see `initial.Role`."""
        return values(self._matrix(name, shape, axes, fan_in=fan_in, residual=residual))

    def looked_up(self, name: str, shape: tuple[int, int], axes: Axes, ids: jax.Array) -> jax.Array:
        """The rows `ids` [...] of a float32 table [V, D] with random initial values: [..., D]."""
        return rows(self._matrix(name, shape, axes), ids)

    def _matrix(
        self, name: str, shape: tuple[int, ...], axes: Axes, *, fan_in: int | None = None, residual: bool = False
    ) -> Weight:
        role = Role(self.path_of(name), shape, axes, fan_in, residual, self.branches)
        return self._declare(name, *self.initial(role), shape, axes)

    def gain(self, name: str, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        """A parameter of ones, float32."""
        return self._declare(name, nn.initializers.ones, "ones", shape, axes)

    def bias(self, name: str, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        """A parameter of zeros, float32."""
        return self._declare(name, nn.initializers.zeros, "zeros", shape, axes)

    def _declare(self, name: str, initializer: Any, distribution: str, shape: tuple[int, ...], axes: Axes) -> Any:
        if self.has_variable("params", name) and isinstance(held := self.get_variable("params", name), Encoded):
            if held.shape != shape:
                raise ValueError(f"{self.path_of(name)} has the shape {held.shape}; the model's is {shape}")
            return held

        def declared(key, shape, dtype):
            return Declared(initializer(key, shape, dtype), names=axes, initial=distribution)

        return self.param(name, declared, shape, jnp.float32)

    def cast(self, x: jax.Array) -> jax.Array:
        """To the compute dtype."""
        return x.astype(self.compute.dtype)


def _nothing() -> Any:
    return None


def _newest(before: Any, new: Any) -> Any:
    return new
