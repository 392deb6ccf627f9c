"""Which parameters a run begins with: drawn from its seed, or those of an existing model."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        """The model that is read, written as the MODEL of a command; None if none is read."""

    @abstractmethod
    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        """The parameters of step 0.

        Args:
            drawn: parameters drawn from the seed: arrays, or ShapeDtypeStructs to check without drawing, in which case
                the result holds them wherever a drawn value would be.
            given: the parameters of `source`, arrays.
            axes: the logical axes of `drawn`.

        Raises:
            UserError: a tensor is in one of the two alone, or differs in shape, and no rule allows it; it is named.
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
    """The parameters of another model. Both models must have the same tensors with the same shapes, except where the
    fields allow a difference."""

    model: str
    """A run folder, a checkpoint (RUN/checkpoints/STEP), a Hugging Face folder or a GGUF file. Other parameters make
    another experiment; another path to the same parameters does not"""
    grow_vocabulary: bool = False
    """Whether tables may have more rows than in `model`: the additional rows are drawn from the seed"""
    new: tuple[str, ...] = ()
    """Path patterns of parameters that are drawn from the seed, such as `("head/*",)`"""
    dropped: tuple[str, ...] = ()
    """Path patterns of parameters of `model` that are not used, such as `("unembed/*",)`"""

    @property
    def source(self) -> str:
        return self.model

    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        drawn_by_path, given_by_path = tree.flatten(drawn), tree.flatten(given)
        axes_by_path = tree.flatten(axes, is_leaf=tree.is_axes)
        for name, patterns, paths in (("new", self.new, drawn_by_path), ("dropped", self.dropped, given_by_path)):
            for pattern in patterns:
                if not any(tree.matches(path, (pattern,)) for path in paths):
                    raise UserError(
                        f"start.{name}: {pattern!r} matches no parameter; the parameters are: {', '.join(paths)}"
                    )
        for path in given_by_path:
            if path not in drawn_by_path and not tree.matches(path, self.dropped):
                raise UserError(
                    f"{self.model} has {path}, which this model lacks{_untied(path, 'this model')}; make the model the "
                    f"same, or leave it out with start.dropped = ({path!r},)"
                )
        result = {path: self._value(path, x, given_by_path, axes_by_path[path]) for path, x in drawn_by_path.items()}
        return tree.unflatten(result)

    def _value(self, path: str, drawn: Any, given_by_path: Mapping[str, Any], axes: tuple[str | None, ...]) -> Any:
        if tree.matches(path, self.new):
            return drawn
        if path not in given_by_path:
            raise UserError(
                f"{self.model} has no {path}, which this model has{_untied(path, self.model)}; make the model the "
                f"same, or have it drawn from the seed with start.new = ({path!r},)"
            )
        given = given_by_path[path]
        if given.shape == drawn.shape:
            return given
        grown = tuple(n if a == "vocab" else m for a, n, m in zip(axes, given.shape, drawn.shape, strict=False))
        rows = axes.index("vocab") if "vocab" in axes else None
        if rows is None or grown != given.shape or given.shape[rows] > drawn.shape[rows]:
            raise UserError(
                f"{path} has shape {list(given.shape)} in {self.model} and {list(drawn.shape)} in this model; make the "
                f"model the same, or have it drawn from the seed with start.new = ({path!r},)"
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


def _untied(path: str, tied: str) -> str:
    """Why a model has no output table: the other one's is not tied."""
    return f" ({tied} is tied: its output head is the embedding table)" if path == "unembed/table" else ""


@dataclass(frozen=True, kw_only=True)
class FromLayers(FromModel):
    """Some layers of a deeper model, and its parameters outside the layers. `layers=(0, 2, 4)` of 6 is how DistilBERT
    begins: Sanh et al. 2019, arXiv:1910.01108, section 2."""

    layers: tuple[int, ...]
    """Indices in the deeper model, from 0, one for each layer of this model"""

    def parameters(self, drawn: Params, given: Params, axes: Any) -> Params:
        """As `FromModel`, after layer i of this model has taken the place of layer `layers[i]` of the other.

        Raises:
            UserError: there are not as many layers as this model has, or an index is out of range; or see `FromModel`.
        """
        theirs, ours = _layers(given), _layers(drawn)
        if len(self.layers) != len(ours):
            raise UserError(
                f"start.layers: {len(self.layers)} layers are named, but this model has {len(ours)}; name one for each"
            )
        for i in self.layers:
            if not 0 <= i < len(theirs):
                raise UserError(
                    f"start.layers: {i} is out of range; {self.model} has the layers 0 to {len(theirs) - 1}"
                )
        parts: dict[str, list[Any]] = {}
        for place, i in zip(ours, self.layers, strict=True):
            for name, stacked in theirs[i].stacks.items():
                parts.setdefault(f"{place.prefix}/{name}", []).append(np.asarray(stacked)[theirs[i].entry])
        outside = {path: x for path, x in tree.flatten(given).items() if not _STAGE.match(path)}
        stacked = {path: np.stack(entries) for path, entries in parts.items()}
        return super().parameters(drawn, tree.unflatten(outside | stacked), axes)


class _Layer(NamedTuple):
    """One layer in a tree of parameters."""

    prefix: str  # of its parameters' paths
    entry: int  # its index along their first dimension
    stacks: Mapping[str, Any]  # the parameters under `prefix`


_STAGE = re.compile(r"(?P<stage>layers(_\d+)?)/(?:(?P<block>\d+)/)?(?P<name>.+)")
"""Paths of parameters of layers: those of a stage, and where its pattern has several blocks, of the block"""


def _layers(params: Params) -> list[_Layer]:
    """The layers in order: stage by stage, in each the blocks of its pattern by turns."""
    stages: dict[str, dict[str, dict[str, Any]]] = {}
    for path, x in tree.flatten(params).items():
        if found := _STAGE.match(path):
            blocks = stages.setdefault(found["stage"], {})
            blocks.setdefault(found["block"] or "", {})[found["name"]] = x
    layers = []
    for stage, blocks in sorted(stages.items(), key=lambda item: int(item[0].partition("_")[2] or 0)):
        ordered = sorted(blocks.items(), key=lambda item: int(item[0] or 0))
        repeats = next(iter(ordered[0][1].values())).shape[0]
        for entry in range(repeats):
            layers += [_Layer("/".join(filter(None, (stage, block))), entry, stacks) for block, stacks in ordered]
    return layers


def content_hash(params: Params) -> str:
    """SHA-256 of parameters: of each one's path, shape, dtype and bytes, whatever file they came from."""
    digest = hashlib.sha256()
    for path, x in sorted(tree.flatten(params).items()):
        array = np.ascontiguousarray(x)
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
