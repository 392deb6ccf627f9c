"""Pruning of a trained model in one shot: single weights by a mask, or layers and channels by cutting them out."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slmjax import tree
from slmjax.compress.prune import oneshot
from slmjax.compress.prune.layout import from_matrices, prunable, to_matrices
from slmjax.compress.prune.structured import block_influence, most_important
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.slicing import keep_layers
from slmjax.nn.compute import Compute
from slmjax.runs.calibrating import Grams, grams
from slmjax.runs.pruning_parts import Progress, Pruning, as_numpy, decoder_of, left
from slmjax.types import Batch, Params


@dataclass(frozen=True, kw_only=True)
class Unstructured(Pruning):
    """Zeros in the matrices of the layers: `N` of each `m` consecutive inputs, or anywhere."""

    m: int | None = None
    """Of each `m` consecutive input channels, the share `sparsity` is zero (2:4 is 0.5 and 4); None: anywhere"""

    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        flat = tree.flatten(params)
        chosen = prunable(model.axes())
        found = grams(model, params, batches) if self.reads_data else None
        total, done, new = sum(len(flat[path]) for path in chosen), 0, dict(flat)
        for path, axes in chosen.items():
            matrices = np.asarray(to_matrices(np.asarray(flat[path]), axes, path))
            pruned = []
            for layer, w in enumerate(matrices):
                pruned.append(self.one(path, layer, w, found).weights)
                done += 1
                progress("matrices", done, total)
            new[path] = from_matrices(np.stack(pruned), tuple(flat[path].shape), axes, path)
        return model, tree.unflatten({path: np.asarray(x) for path, x in new.items()})

    @abc.abstractmethod
    def one(self, path: str, layer: int, w: np.ndarray, found: Grams | None) -> oneshot.Pruned:
        """One matrix [out, in]."""


@dataclass(frozen=True, kw_only=True)
class Magnitude(Unstructured):
    """The smallest weights of each matrix. Han et al. 2015, arXiv:1506.02626."""

    reads_data = False

    def one(self, path: str, layer: int, w: np.ndarray, found: Grams | None) -> oneshot.Pruned:
        return oneshot.magnitude(w, self.sparsity, m=self.m)


@dataclass(frozen=True, kw_only=True)
class Wanda(Unstructured):
    """By weight and activation. Sun et al. 2024, arXiv:2306.11695."""

    def one(self, path: str, layer: int, w: np.ndarray, found: Grams | None) -> oneshot.Pruned:
        assert found is not None
        return oneshot.wanda(w, found.of(path)[layer], self.sparsity, m=self.m)


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Unstructured):
    """The weights that stay make up for those removed. Frantar and Alistarh 2023, arXiv:2301.00774."""

    def one(self, path: str, layer: int, w: np.ndarray, found: Grams | None) -> oneshot.Pruned:
        assert found is not None
        return oneshot.sparsegpt(w, found.of(path)[layer], self.sparsity, m=self.m)


@dataclass(frozen=True, kw_only=True)
class Depth(Pruning):
    """Leaves out the layers that change the residual stream least. Men et al. 2024 (ShortGPT), arXiv:2403.03853."""

    def __call__(
        self, model: Assembly, params: Params, batches: tuple[Batch, ...], progress: Progress
    ) -> tuple[Assembly, Params]:
        decoder, keep = decoder_of(model), left(model.layers, self.sparsity, "layers")
        built = decoder.build(Compute())
        run = jax.jit(lambda params, b: built.apply(params, b.tokens, b.positions, b.segment_ids, collect=True).blocks)
        sums = np.zeros(model.layers)
        for done, batch in enumerate(batches, start=1):
            sums += np.asarray(block_influence(run(params, jax.tree.map(np.asarray, batch)), batch.segment_ids > 0))
            progress("batches", done, len(batches))
        return as_numpy(*keep_layers(decoder, params, most_important(sums, keep)))


METHODS: dict[str, Callable[..., Pruning]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "depth": Depth,
}
"""What `slmjax prune --method` takes, besides `width` (`pruning_width.WIDTHS`)"""


def pattern(text: str | None) -> tuple[float, int] | None:
    """`2:4` -> (the share that is removed, 4); None for None.

    Raises:
        UserError: it is not N:M.
    """
    if text is None:
        return None
    kept, _, of = text.partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise UserError(f"--pattern is {text!r}; expected N:M, N weights kept of each M, such as 2:4")
    return 1 - int(kept) / int(of), int(of)


def zeros(params: Any, paths: Any) -> float:
    """The share of zeros in these parameters."""
    flat = tree.flatten(params)
    return float(sum((flat[path] == 0).sum() for path in paths) / sum(flat[path].size for path in paths))
