"""Where a student gets its teacher's last hidden states from: the teacher itself, or a disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from slmjax.data.spec import Data, PackedText
from slmjax.data.teacher_targets import TeacherTargets
from slmjax.distill.teacher import Teacher
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token
from slmjax.tree import flatten, is_axes, unflatten
from slmjax.types import Batch, Model, Output, Params


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A source of hidden states."""

    inside: ClassVar[bool]
    """Whether `output` can give more than the last hidden states"""
    output_tables: ClassVar[bool] = False
    """Whether the output table of a teacher alone will do"""

    @abstractmethod
    def output(self, teacher: Teacher, params: Params, batch: Batch, *, collect: bool) -> Output:
        """The teacher's last hidden states [B, T, D], and with `collect` what its layers compute."""

    @abstractmethod
    def reduced(self, teacher: Teacher) -> Teacher:
        """The teacher with those parameters alone that the step reads."""

    @abstractmethod
    def flops(self, theirs: Assembly, length: int, predicted: float) -> float:
        """FLOPs a token of a teacher in a training step, at sequences of that length."""

    def reads(self, data: Data, teachers: Sequence[str]) -> None:  # noqa: B027  a teacher that runs reads nothing
        """Checks the fields of an experiment.

        Raises:
            UserError: these data do not hold what is read.
        """

    def ready(self, data: Data, models: Mapping[str, str]) -> None:  # noqa: B027  likewise
        """Checks, when a run begins, that what is on disk belongs to the teachers.

        Args:
            models: the content hash of each teacher, by its path.

        Raises:
            UserError: it belongs to others.
        """


@dataclass(frozen=True, kw_only=True)
class Online(Source):
    """The teachers run in every step."""

    inside: ClassVar[bool] = True

    def output(self, teacher: Teacher, params: Params, batch: Batch, *, collect: bool) -> Output:
        return teacher.model.apply(params, batch.tokens, batch.positions, batch.segment_ids, collect=collect)

    def reduced(self, teacher: Teacher) -> Teacher:
        return teacher

    def flops(self, theirs: Assembly, length: int, predicted: float) -> float:
        return flops_per_token(theirs, length, predicted).attention / 3


@dataclass(frozen=True, kw_only=True)
class OnDisk(Source):
    """The hidden states are those that `slmjax data teacher --targets hidden` wrote, read by `data.extra`
    (TeacherTargets). Of the teacher its output table alone is needed: `objective.teachers` is FOLDER/head, or it."""

    inside: ClassVar[bool] = False
    output_tables: ClassVar[bool] = True

    def output(self, teacher: Teacher, params: Params, batch: Batch, *, collect: bool) -> Output:
        return Output(batch.extra["hidden"].astype(jnp.float32))

    def reduced(self, teacher: Teacher) -> Teacher:
        needed = read_by_unembed(teacher.model)
        of = {path: x for path, x in flatten(teacher.params).items() if path in needed}
        axes = {path: x for path, x in flatten(teacher.model.axes, is_leaf=is_axes).items() if path in needed}
        return replace(teacher, params=unflatten(of), model=teacher.model._replace(axes=unflatten(axes)))

    def flops(self, theirs: Assembly, length: int, predicted: float) -> float:
        return 2.0 * theirs.logit_products() * predicted

    def reads(self, data: Data, teachers: Sequence[str]) -> None:
        targets_of(data, "objective.source is OnDisk")
        if len(teachers) != 1:
            raise UserError(f"objective.teachers names {len(teachers)} models; hidden states on disk are of one")

    def ready(self, data: Data, models: Mapping[str, str]) -> None:
        for folder, targets in targets_of(data, "objective.source is OnDisk").by_folder.items():
            if "hidden" not in targets.columns:
                raise UserError(
                    f"objective.source is OnDisk, but {folder} has no hidden states; use DistillOffline(), or write "
                    "them with `slmjax data teacher --targets hidden`"
                )
            teacher = targets.manifest["teacher"]
            for path, found in models.items():
                if found not in (teacher["hash"], teacher["head"]):
                    raise UserError(
                        f"objective.teachers: {path} ({found[:12]}) is another model than the teacher of {folder} "
                        f"({teacher['name']}, {teacher['hash'][:12]}); name {folder}/head"
                    )


def targets_of(data: Data, why: str) -> TeacherTargets:
    """The `TeacherTargets` of the data.

    Raises:
        UserError: they have none.
    """
    extra = data.extra if isinstance(data, PackedText) else None
    if not isinstance(extra, TeacherTargets):
        raise UserError(
            f"{why}, but data.extra reads no targets of a teacher; set data.extra to TeacherTargets(folders=(...,)), "
            "with folders that `slmjax data teacher` has written"
        )
    return extra


def read_by_unembed(model: Model) -> frozenset[str]:
    """The paths of the parameters that the logits follow from, given the hidden state."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    one = jnp.zeros((1, 1), jnp.int32)
    hidden = jax.eval_shape(lambda p: model.apply(p, one, one, one).hidden, params)
    traced = jax.make_jaxpr(model.unembed)(params, hidden).jaxpr
    used = {id(x) for equation in traced.eqns for x in equation.invars}
    return frozenset(path for path, x in zip(flatten(params), traced.invars, strict=False) if id(x) in used)
