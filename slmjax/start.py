"""Which parameters a run begins with: drawn from its seed, or those of a model that is there already."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmjax import tree
from slmjax.errors import UserError
from slmjax.types import Params


@dataclass(frozen=True, kw_only=True)
class Start(ABC):
    """Where the parameters of step 0 come from."""

    @property
    @abstractmethod
    def source(self) -> str | None:
        """The MODEL that is read, as the command line takes it; None if none is."""

    @abstractmethod
    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        """The parameters of step 0.

        Args:
            drawn: those that the seed gives: arrays, or ShapeDtypeStructs, to check without drawing; where values are
                needed the result then has the ShapeDtypeStruct.
            given: those of `source`, arrays.
            axes: the logical axes of `drawn`.

        Raises:
            UserError: a tensor of the two differs where no rule allows it; it is named.
        """


@dataclass(frozen=True, kw_only=True)
class FromScratch(Start):
    """Parameters are drawn from the experiment's seed."""

    @property
    def source(self) -> None:
        return None

    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        return drawn


@dataclass(frozen=True, kw_only=True)
class FromModel(Start):
    """The parameters of another model. Each tensor must be there with the same shape, but for what the rules allow."""

    model: str
    """A run folder, a checkpoint (RUN/checkpoints/STEP), a Hugging Face folder or a GGUF file. A change of its
    parameters makes another experiment; where it lies does not matter"""
    grow_vocabulary: bool = False
    """Whether tables may have more rows than those of the model: these are drawn from the seed"""
    new: tuple[str, ...] = ()
    """Path patterns of parameters that are drawn from the seed, such as `("head/*",)`"""
    dropped: tuple[str, ...] = ()
    """Path patterns of parameters of the model that are left out, such as `("unembed/*",)`"""

    @property
    def source(self) -> str:
        return self.model

    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        ours, theirs = tree.flatten(drawn), tree.flatten(given)
        of = tree.flatten(axes, is_leaf=tree.is_axes)
        for name, patterns, paths in (("new", self.new, ours), ("dropped", self.dropped, theirs)):
            for pattern in patterns:
                if not any(tree.matches(path, (pattern,)) for path in paths):
                    raise UserError(f"start.{name}: {pattern!r} matches no parameter; there are: {', '.join(paths)}")
        for path in theirs:
            if path not in ours and not tree.matches(path, self.dropped):
                raise UserError(
                    f"{self.model} has {path}, which this model lacks; make the model the same, or leave it out with "
                    f"start.dropped = ({path!r},)"
                )
        taken = {path: self._taken(path, x, theirs, of[path]) for path, x in ours.items()}
        return tree.unflatten(taken)

    def _taken(self, path: str, drawn: Any, theirs: Mapping[str, Any], axes: tuple[str | None, ...]) -> Any:
        if tree.matches(path, self.new):
            return drawn
        if path not in theirs:
            raise UserError(
                f"{self.model} has no {path}, which this model has; make the model the same, or have it drawn anew "
                f"with start.new = ({path!r},)"
            )
        given = theirs[path]
        if given.shape == drawn.shape:
            return given
        grown = tuple(n if a == "vocab" else m for a, n, m in zip(axes, given.shape, drawn.shape, strict=False))
        rows = axes.index("vocab") if "vocab" in axes else None
        if rows is None or grown != given.shape or given.shape[rows] > drawn.shape[rows]:
            raise UserError(
                f"{path} has shape {list(given.shape)} in {self.model} and {list(drawn.shape)} in this model; make the "
                f"model the same, or have it drawn anew with start.new = ({path!r},)"
            )
        if not self.grow_vocabulary:
            raise UserError(
                f"{path} has {given.shape[rows]} rows in {self.model} and {drawn.shape[rows]} in this model; a larger "
                "vocabulary is allowed by start.grow_vocabulary = True"
            )
        if not hasattr(drawn, "__array__"):
            return drawn
        out = np.array(drawn)
        out[(*(slice(None),) * rows, slice(0, given.shape[rows]))] = np.asarray(given)
        return out


def content_hash(params: Params) -> str:
    """SHA-256 of parameters: of each one's path, shape, dtype and bytes, whatever file they came from."""
    digest = hashlib.sha256()
    for path, x in sorted(tree.flatten(params).items()):
        array = np.ascontiguousarray(x)
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
