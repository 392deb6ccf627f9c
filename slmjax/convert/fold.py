"""Multiplies a decoder's scalars into its weights: another decoder, other parameters, the same function.

muP, Granite and MiniCPM multiply embeddings, scores, branches and logits by constants. Each multiplies the output of a
matrix or of a norm's gain, so it can be multiplied into that matrix or gain, exactly up to rounding; the result is a
plain GPT-2 or Llama. Further training of the folded model differs, since the optimizer sees other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from slmjax.errors import UserError
from slmjax.models.decoder import Decoder
from slmjax.nn.attention import Queries
from slmjax.nn.block import AnyBlock, Block, NormedStream, Parallel, ParallelShared, PostNorm
from slmjax.nn.mlp import MLP, GatedMLP
from slmjax.nn.norm import LayerNorm, RMSNorm
from slmjax.tree import flatten, unflatten
from slmjax.types import Params


class Unfoldable(UserError):
    """A scalar that cannot be multiplied into any weight."""


class Step(NamedTuple):
    """The change of one parameter: x becomes `factor` * x + `shift`."""

    path: str
    factor: float
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A decoder after some of its scalars were folded into the weights."""

    decoder: Any
    """The decoder with those scalars at their neutral values"""
    steps: tuple[Step, ...] = ()
    scalars: tuple[str, ...] = ()
    """The folded scalars as text: "embed_scale = 12.0" """

    def apply(self, params: Params) -> Params:
        """Parameters of the original decoder -> those of the folded one. Unchanged parameters are the same arrays."""
        leaves = dict(flatten(params))
        for path, factor, shift in self.steps:
            x = np.asarray(leaves[path]) * np.float32(factor)
            leaves[path] = x + np.float32(shift) if shift else x
        return unflatten(leaves)


Fold = Callable[[Folded], Folded]
"""Removes one kind of scalar; returns its argument unchanged if the decoder has none. Raises Unfoldable"""


def embed_scale(f: Folded) -> Folded:
    """Folds `embed_scale` into the embedding table. If the table is tied, divides the final norm's gain by it, which
    keeps the logits the same."""
    d, scale = f.decoder, f.decoder.embed_scale
    if scale == 1.0:
        return f
    if d.table_width is not None:
        steps: tuple[Step, ...] = (Step("embed/project", scale),)
    else:
        steps = (Step("embed/table", scale), *(_logits_times(d, 1 / scale, "embed_scale") if d.tied else ()))
    return _further(f, replace(d, embed_scale=1.0), steps, [f"embed_scale = {scale:.6g}"])


def position_scale(f: Folded) -> Folded:
    """Folds `position.scale` into the position table."""
    d, position = f.decoder, f.decoder.position
    if position is None or position.scale == 1.0:
        return f
    words = [f"position.scale = {position.scale:.6g}"]
    return _further(
        f, replace(d, position=replace(position, scale=1.0)), [Step("embed/positions", position.scale)], words
    )


def logits_scale(f: Folded) -> Folded:
    """Folds `logits.scale` into the output table, or into the final norm if the table is tied."""
    d, scale = f.decoder, f.decoder.logits.scale
    if scale == 1.0:
        return f
    steps = _logits_times(d, scale, "logits.scale")
    return _further(f, replace(d, logits=replace(d.logits, scale=1.0)), steps, [f"logits.scale = {scale:.6g}"])


def attention_scale(f: Folded) -> Folded:
    """Folds `mixer.scale` into the query projection: scores are scale * q·k, and 1/sqrt(d) is the default scale."""

    def without(block: AnyBlock, path: str) -> tuple[AnyBlock, list[Step], list[str]]:
        mixer = block.mixer
        if not isinstance(mixer, Queries) or mixer.scale is None:
            return block, [], []
        factor = mixer.scale * math.sqrt(mixer.head_dim)
        words = [] if math.isclose(factor, 1.0, rel_tol=1e-12) else [f"mixer.scale = {mixer.scale:.6g}"]
        if words and mixer.qk_norm is not None:
            raise Unfoldable(f"mixer.scale = {mixer.scale:.6g}: a norm follows the queries and would undo a factor")
        names = ("attn/q", "attn/q_bias") if words else ()
        return replace(block, mixer=replace(mixer, scale=None)), [Step(f"{path}/{n}", factor) for n in names], words

    return _in_blocks(f, without)


def branch_scale(f: Folded) -> Folded:
    """Folds `branch_scale` into the matrices that write to the residual stream, and their biases."""

    def without(block: AnyBlock, path: str) -> tuple[AnyBlock, list[Step], list[str]]:
        scale = block.branch_scale
        if scale == 1.0:
            return block, [], []
        words = f"branch_scale = {scale:.6g}"
        if type(block) not in (Block, NormedStream, Parallel, ParallelShared, PostNorm):
            raise Unfoldable(f"{words}: a norm follows the branches of {type(block).__name__} and would undo a factor")
        if not isinstance(block.mixer, Queries) or not isinstance(block.mlp, MLP | GatedMLP):
            raise Unfoldable(
                f"{words}: no known weight ends {type(block.mixer).__name__} or {type(block.mlp).__name__}"
            )
        names = ("attn/o", "attn/o_bias", "mlp/down", "mlp/down_bias")
        return replace(block, branch_scale=1.0), [Step(f"{path}/{name}", scale) for name in names], [words]

    return _in_blocks(f, without)


FOLDS: tuple[Fold, ...] = (embed_scale, position_scale, attention_scale, branch_scale, logits_scale)


def fold(decoder: Decoder, folds: Iterable[Fold] = FOLDS) -> Folded:
    """Folds the scalars of a decoder into its weights.

    Args:
        folds: the kinds of scalar to fold.

    Raises:
        Unfoldable: one of them cannot be multiplied into any weight.
    """
    folded = Folded(decoder=decoder)
    for one in folds:
        folded = one(folded)
    return folded


def _logits_times(d: Decoder, factor: float, name: str) -> tuple[Step, ...]:
    """Steps that multiply the logits by `factor` and change nothing else. `name`: of the scalar, for messages."""
    if not d.tied:
        return (Step("unembed/table", factor),)
    if d.table_width is not None:
        return (Step("project_out/weight", factor),)
    norm = d.final_norm
    if isinstance(norm, RMSNorm):
        return (Step("final_norm/scale", factor, (factor - 1) * norm.offset),)
    if isinstance(norm, LayerNorm) and norm.gain:
        return (Step("final_norm/scale", factor), Step("final_norm/bias", factor))
    raise Unfoldable(
        f"{name}: the table is tied and no gain of a final norm can make the logits {factor:.6g} times as large"
    )


def _further(f: Folded, decoder: Decoder, steps: Iterable[Step], words: Iterable[str]) -> Folded:
    there = set(decoder.paths())  # a bias may be missing
    kept = tuple(step for step in steps if step.path in there)
    return Folded(decoder=decoder, steps=(*f.steps, *kept), scalars=(*f.scalars, *words))


def _in_blocks(f: Folded, without: Callable[[AnyBlock, str], tuple[Any, list[Step], list[str]]]) -> Folded:
    """Applies `without` to every block of the decoder; scalars that blocks share are listed once."""
    d, steps, words, blocks = f.decoder, [], [], []
    for place in d.places():
        block, more, scalars = without(place.block, place.path)
        blocks.append(block)
        steps += more
        words += [text for text in scalars if text not in words]
    if blocks == [place.block for place in d.places()]:
        return f
    stages, at = [], 0
    for stage in d.stages:
        stages.append(replace(stage, pattern=tuple(blocks[at : at + len(stage.pattern)])))
        at += len(stage.pattern)
    return _further(f, replace(d, pattern=stages[0].pattern, tail=tuple(stages[1:])), steps, words)
