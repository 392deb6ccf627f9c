"""What the inputs of a model's products look like on data: their Gram matrices, for post-training methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import tree
from slmjax.compress.quant.activations import RoundedInputs, Static, summed
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics, Product
from slmjax.types import Batch, Params


class Grams:
    """Sums over tokens of x^T x, for the inputs x of each product, by path and layer; and the size of each channel."""

    def __init__(self) -> None:
        self.sums: dict[str, list[np.ndarray]] = {}
        self.means: dict[str, list[np.ndarray]] = {}
        self.squares: dict[str, list[np.ndarray]] = {}
        self.lengths: dict[str, list[np.ndarray]] = {}
        self.tokens = 0
        self._calls: dict[str, int] = {}

    def begin(self) -> None:
        """Called before each batch: its layers are counted from 0 again."""
        self._calls = {}

    def add(self, path: str, gram: np.ndarray, means: np.ndarray, lengths: np.ndarray) -> None:
        """Adds x^T x [in, in], the mean of |x| over each sequence [B, in], and that of the length of each head [B, H]
        (of an x without heads, of the whole x: [B, 1]), of the next layer that has this path."""
        layer = self._calls.get(path, 0)
        self._calls[path] = layer + 1
        over = means.sum(axis=0), np.square(means).sum(axis=0), np.square(lengths).sum(axis=0)
        for sums, x in zip((self.sums, self.means, self.squares, self.lengths), (gram, *over), strict=True):
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

    def sizes(self, path: str) -> np.ndarray:
        """float64 [layers, in]: the mean of |x|, up to a factor that all channels share."""
        self.of(path)
        return np.stack(self.means[path])

    def importance(self, path: str) -> np.ndarray:
        """float64 [layers, in]: the mean of |x| over each sequence, and of these the L2 norm over sequences
        (`compress.prune.structured.channel_importance`)."""
        self.of(path)
        return np.sqrt(np.stack(self.squares[path]))

    def head_importance(self, path: str) -> np.ndarray:
        """float64 [layers, H]: as `importance`, of the length of each head (`structured.head_importance`)."""
        self.of(path)
        return np.sqrt(np.stack(self.lengths[path]))


@dataclass(frozen=True, kw_only=True)
class Recorded(Product):
    """Products without rounding that give the Gram matrix of their inputs to `add`, layer after layer."""

    add: Callable[[str, np.ndarray, np.ndarray, np.ndarray], None] = field(compare=False)

    def __call__(self, path: str, equation: str, x: jax.Array, weight: jax.Array, einsum: Callable) -> jax.Array:
        over = summed(equation, x.ndim)
        tokens = tuple(i for i in range(x.ndim) if i not in over)
        channels = int(np.prod([x.shape[i] for i in over]))
        rows = jnp.transpose(x, (*tokens, *over)).reshape(x.shape[0], -1, channels)
        flat = rows.reshape(-1, channels)
        gram = jnp.matmul(flat.T, flat, precision="highest")
        means = jnp.mean(jnp.abs(rows), axis=1)
        heads = x.shape[over[0]] if len(over) > 1 else 1
        lengths = jnp.mean(jnp.linalg.norm(rows.reshape(*rows.shape[:2], heads, -1), axis=-1), axis=1)

        def record(*found: Any) -> np.ndarray:
            self.add(path, *(np.asarray(each, np.float64) for each in found))
            return np.zeros((), np.float32)

        # What is returned is added to x, so that the layers call one after another. Not `io_callback`: Flax's scan over
        # layers takes its effect for a dependency between layers.
        zero = jax.pure_callback(record, jax.ShapeDtypeStruct((), np.float32), gram, means, lengths)
        return einsum(equation, x + zero.astype(x.dtype), weight)


@dataclass(frozen=True, kw_only=True)
class Seen(Product):
    """Products without rounding that give the largest |x| of their inputs to `add`."""

    add: Callable[[str, float], None] = field(compare=False)

    def __call__(self, path: str, equation: str, x: jax.Array, weight: jax.Array, einsum: Callable) -> jax.Array:
        def record(largest: Any) -> np.ndarray:
            self.add(path, float(largest))
            return np.zeros((), np.float32)

        zero = jax.pure_callback(record, jax.ShapeDtypeStruct((), np.float32), jnp.max(jnp.abs(x)).astype(jnp.float32))
        return einsum(equation, x + zero.astype(x.dtype), weight)


def grams(
    model: Assembly,
    params: Params,
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda done: None,
    hidden: Callable[[jax.Array], None] | None = None,
) -> Grams:
    """The Gram matrices of the inputs of every product inside the layers, in float32.

    Rows with padding are left out, for padding would be counted as tokens.

    Args:
        progress: called with the number of batches done.
        hidden: called with the output of the last norm [B, T, D] of each batch.

    Raises:
        UserError: no row is without padding.
    """
    found = Grams()
    run = model.build(Compute(), Numerics(product=Recorded(add=found.add)))

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        output = run.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        return output if hidden is not None else output[:1, :1]

    for done, rows in enumerate(_whole_rows(batches), start=1):
        if rows is not None:
            found.begin()
            output = jax.block_until_ready(forward(params, rows))
            if hidden is not None:
                hidden(output)
            found.tokens += rows.tokens.size
        progress(done)
    return found


def with_static_scales(model: Assembly, params: Params, batches: Iterable[Batch], numerics: Numerics) -> Numerics:
    """`numerics` whose activations are rounded with fixed scales: for each parameter, from the largest |x| that the
    model in full precision has on these batches (rows with padding left out), in all layers of a stack together.

    Args:
        numerics: its product is `RoundedInputs`, whose patterns say which parameters get a scale.

    Raises:
        UserError: the product is of another kind, its patterns match no product, or no row is without padding.
    """
    product = numerics.product
    if not isinstance(product, RoundedInputs):
        raise UserError(
            f"numerics.product is {type(product).__name__}; expected RoundedInputs, whose scales are measured"
        )
    largest: dict[str, float] = {}

    def add(path: str, value: float) -> None:
        largest[path] = max(value, largest.get(path, 0.0))

    run = model.build(Compute(), replace(numerics, product=Seen(add=add)))

    @jax.jit
    def forward(params: Params, batch: Batch) -> jax.Array:
        hidden = run.apply(params, batch.tokens, batch.positions, batch.segment_ids).hidden
        return run.unembed(params, hidden)[..., :1]

    for rows in _whole_rows(batches):
        if rows is not None:
            jax.block_until_ready(forward(params, rows))
    chosen = tuple((path, value) for path, value in largest.items() if tree.matches(path, product.patterns))
    if not chosen:
        patterns, there = ", ".join(product.patterns), ", ".join(largest)
        raise UserError(f"numerics.product.patterns {patterns} match no product of the model; there are: {there}")
    return replace(numerics, product=replace(product, scale=Static(largest=chosen)))


def _whole_rows(batches: Iterable[Batch]) -> Iterator[Batch | None]:
    """Of each batch the rows without padding; None if there are none.

    Raises:
        UserError: at the end, if no batch has any.
    """
    read = whole = 0
    for batch in batches:
        keep = np.all(np.asarray(batch.segment_ids) > 0, axis=1)
        read, whole = read + 1, whole + int(keep.sum())
        yield jax.tree.map(lambda x, keep=keep: np.asarray(x)[keep], batch) if keep.any() else None
    if not read:
        raise UserError("the calibration data have no sequence; lower --length, or give more text")
    if not whole:
        raise UserError("every row of the calibration data has padding; give --length, shorter than the documents")
