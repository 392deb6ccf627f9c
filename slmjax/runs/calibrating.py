"""What the inputs of a model's products look like on data: their Gram matrices, for post-training methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.compress.quant.activations import summed
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics, Product
from slmjax.types import Batch, Params


class Grams:
    """Sums over tokens of x^T x, for the inputs x of each product, by path and layer; and the size of each channel."""

    def __init__(self) -> None:
        self.sums: dict[str, list[np.ndarray]] = {}
        self.squares: dict[str, list[np.ndarray]] = {}
        self.tokens = 0
        self._calls: dict[str, int] = {}

    def begin(self) -> None:
        """Called before each batch: its layers are counted from 0 again."""
        self._calls = {}

    def add(self, path: str, gram: np.ndarray, squares: np.ndarray) -> None:
        """Adds x^T x [in, in] and the squared means [in] of the next layer that has this path."""
        layer = self._calls.get(path, 0)
        self._calls[path] = layer + 1
        for sums, x in ((self.sums, gram), (self.squares, squares)):
            rows = sums.setdefault(path, [])
            if layer == len(rows):
                rows.append(np.zeros(x.shape, np.float64))
            rows[layer] += x

    def of(self, path: str) -> np.ndarray:
        """float64 [layers, in, in].

        Raises:
            UserError: the model has no product with this parameter.
        """
        if path not in self.sums:
            raise UserError(f"{path} is in no product of the model; there are: {', '.join(self.sums)}")
        return np.stack(self.sums[path])

    def importance(self, path: str) -> np.ndarray:
        """float64 [layers, in]: the mean of |x| over each sequence, and of these the L2 norm over sequences
        (`compress.prune.structured.channel_importance`)."""
        self.of(path)
        return np.sqrt(np.stack(self.squares[path]))


@dataclass(frozen=True, kw_only=True)
class Recorded(Product):
    """Products without rounding that give the Gram matrix of their inputs to `add`, layer after layer."""

    add: Callable[[str, np.ndarray, np.ndarray], None] = field(compare=False)

    def __call__(self, path: str, equation: str, x: jax.Array, weight: jax.Array, einsum: Callable) -> jax.Array:
        over = summed(equation, x.ndim)
        tokens = tuple(i for i in range(x.ndim) if i not in over)
        channels = int(np.prod([x.shape[i] for i in over]))
        rows = jnp.transpose(x, (*tokens, *over)).reshape(x.shape[0], -1, channels)
        flat = rows.reshape(-1, channels)
        gram = jnp.matmul(flat.T, flat, precision="highest")
        squares = jnp.sum(jnp.square(jnp.mean(jnp.abs(rows), axis=1)), axis=0)

        def record(gram: Any, squares: Any) -> np.ndarray:
            self.add(path, np.asarray(gram, np.float64), np.asarray(squares, np.float64))
            return np.zeros((), np.float32)

        # What is returned is added to x, so that the layers call one after another. Not `io_callback`: Flax's scan over
        # layers takes its effect for a dependency between layers.
        zero = jax.pure_callback(record, jax.ShapeDtypeStruct((), np.float32), gram, squares)
        return einsum(equation, x + zero.astype(x.dtype), weight)


def grams(
    model: Assembly, params: Params, batches: Iterable[Batch], progress: Callable[[int], None] = lambda done: None
) -> Grams:
    """The Gram matrices of the inputs of every product inside the layers, in float32.

    Rows with padding are left out, for padding would be counted as tokens.

    Args:
        progress: called with the number of batches done.

    Raises:
        UserError: no row is without padding.
    """
    found = Grams()
    run = model.build(Compute(), Numerics(product=Recorded(add=found.add)))

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        return run.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden[:1, :1]

    for done, batch in enumerate(batches, start=1):
        whole = np.all(np.asarray(batch.segment_ids) > 0, axis=1)
        if whole.any():
            rows = jax.tree.map(lambda x, keep=whole: np.asarray(x)[keep], batch)
            found.begin()
            jax.block_until_ready(forward(params, rows))
            found.tokens += rows.tokens.size
        progress(done)
    if not found.tokens:
        raise UserError("every row of the calibration data has padding; give --length, shorter than the documents")
    return found
