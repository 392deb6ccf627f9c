"""Which layer of the teacher each layer of the student learns from.

Layers count from 1. Number 0 is the embedding, the input of the first layer; it has hidden vectors but no attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from slmjax.errors import UserError

Pairs = tuple[tuple[int, int], ...]
"""(layer of the student, layer of the teacher)"""


@dataclass(frozen=True, kw_only=True)
class LayerMap(ABC):
    """A rule from the numbers of layers of both models to pairs of layers."""

    @abstractmethod
    def pairs(self, student: int, teacher: int) -> Pairs:
        """The pairs, by the layer of the student.

        Args:
            student: M, its number of layers.
            teacher: N, its number of layers.

        Raises:
            UserError: the rule does not fit these numbers.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform(LayerMap):
    """g(m) = m N / M, rounded up where M does not divide N: the last layer learns from the last. Jiao et al. 2020
    (TinyBERT), arXiv:1909.10351, section 3."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        return tuple((m, -(-m * teacher // student)) for m in range(1, student + 1))


@dataclass(frozen=True, kw_only=True)
class Last(LayerMap):
    """The last `count` layers of the student learn from the last `count` of the teacher. With 1: Wang et al. 2020
    (MiniLM), arXiv:2002.10957; with more: Sun et al. 2019 (PKD-Last), arXiv:1908.09355."""

    count: int = 1

    def pairs(self, student: int, teacher: int) -> Pairs:
        if not 1 <= self.count <= min(student, teacher):
            raise UserError(
                f"layers.count: {self.count} layers, but the student has {student} and the teacher {teacher}; choose 1 "
                f"to {min(student, teacher)}"
            )
        return tuple((student - i, teacher - i) for i in reversed(range(self.count)))


@dataclass(frozen=True, kw_only=True)
class Skip(LayerMap):
    """g(m) = every * m. Sun et al. 2019 (PKD-Skip), arXiv:1908.09355, section 3.2."""

    every: int = 2

    def pairs(self, student: int, teacher: int) -> Pairs:
        if self.every < 1 or self.every * student > teacher:
            raise UserError(
                f"layers.every: layer {student} of the student would learn from layer {self.every * student} of a "
                f"teacher with {teacher} layers; choose 1 to {teacher // student}, or Uniform()"
            )
        return tuple((m, self.every * m) for m in range(1, student + 1))


@dataclass(frozen=True, kw_only=True)
class OneToOne(LayerMap):
    """g(m) = m, for models with equally many layers. Sun et al. 2020 (MobileBERT), arXiv:2004.02984."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        if student != teacher:
            raise UserError(
                f"layers: OneToOne, but the student has {student} layers and the teacher {teacher}; use Uniform()"
            )
        return tuple((m, m) for m in range(1, student + 1))


@dataclass(frozen=True, kw_only=True)
class Explicit(LayerMap):
    """The pairs themselves."""

    to: Pairs
    """(layer of the student, layer of the teacher), each"""

    def pairs(self, student: int, teacher: int) -> Pairs:
        if not self.to:
            raise UserError("layers.to: empty; give at least one pair (layer of the student, layer of the teacher)")
        for m, n in self.to:
            if not (0 <= m <= student and 0 <= n <= teacher):
                raise UserError(
                    f"layers.to: ({m}, {n}) is out of range; the student has layers 1 to {student} and the teacher "
                    f"1 to {teacher} (0: the embedding)"
                )
        return self.to


@dataclass(frozen=True, kw_only=True)
class Embedding(LayerMap):
    """The embedding of the student learns from that of the teacher."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        return ((0, 0),)
