"""The data of an experiment, as frozen values that JSON can hold; each opens the data that it describes."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slmjax.data.extra import Extra, NoExtra, added
from slmjax.data.packing import BestFit, Packing
from slmjax.data.recipe import Recipe
from slmjax.data.rows import empty_batch
from slmjax.data.stream import Prefetch
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.weighting import EveryToken, Weighting
from slmjax.data.work import Progress
from slmjax.errors import DataError
from slmjax.serialise import to_json
from slmjax.types import Batch, BatchStream

if TYPE_CHECKING:
    from slmjax.data.loader import OpenedText


@dataclass(frozen=True, kw_only=True)
class Store:
    """One split of a data set, as a run's config.json lists it, with what the model card needs to know of it."""

    name: str
    location: str
    """Folder or URL"""
    fingerprint: str
    """Equal fingerprints mean the same tokens"""
    split: Literal["train", "validation"]
    tokens: int
    """In that split"""
    share: float | None = None
    """Of the training sequences"""
    sources: tuple[Mapping[str, Any], ...] = ()
    """Where its text is from: each with name, licence, url (or None) and documents (or None)"""


class Opened(abc.ABC):
    """Data that are ready to be read."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the data, for logs and messages"""

    @property
    @abc.abstractmethod
    def stores(self) -> tuple[Store, ...]:
        """The stores that are read, those of training first. Their fingerprints are part of the experiment's"""

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """The smallest vocabulary that a model may have: the largest token id plus one"""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes that `Batch.extra["labels"]` indexes; empty if the data have no labels"""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log before training begins"""
        return ()

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text, with its special token ids (`Tokenizer.special`)."""

    @property
    @abc.abstractmethod
    def tokenizer_path(self) -> Path:
        """A local folder with tokenizer.json and tokenizer_config.json, which a run copies."""

    @abc.abstractmethod
    def epochs(self, sequences: int) -> float:
        """How many epochs this many training sequences are; padding does not count."""

    @abc.abstractmethod
    def training(self, *, host: int = 0, hosts: int = 1, reader: Prefetch | None = None) -> BatchStream:
        """This host's rows of an endless stream, whose position can be saved.

        Args:
            reader: how batches are read ahead; None: in threads.

        Raises:
            DataError: the batch cannot be split over the hosts.
        """

    @property
    @abc.abstractmethod
    def has_validation(self) -> bool:
        """Whether there is any validation data"""

    @abc.abstractmethod
    def validation(self, batches: int | None = None, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """This host's rows of the same batches every time: each sequence at most once, the last batch filled with rows
        of weight 0.

        Args:
            batches: at most this many; None reads the whole split.
        """


@dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """The data of a run. A subclass is a frozen dataclass that opens what it describes."""

    length: int
    """Tokens a sequence"""
    batch: int
    """Sequences a step, over all hosts"""
    next_tokens: ClassVar[bool] = True
    """Whether `targets` of its batches are the tokens that follow"""

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 1 << 24:
            raise DataError(f"data.length is {self.length}; expected 2 to {1 << 24} tokens a sequence")
        if self.batch < 1:
            raise DataError(f"data.batch is {self.batch}; expected at least 1 sequence a step")

    @abc.abstractmethod
    def open(self, *, cache: str | Path | None = None, progress: Progress | None = None) -> Opened:
        """Opens everything that is read, and builds what does not exist yet.

        Args:
            cache: folder for built files, which later runs use again (`build.cache_folder`).

        Raises:
            DataError: a file is missing or damaged.
        """

    @abc.abstractmethod
    def reopen(self, stores: Sequence[Mapping[str, Any]], *, cache: str | Path | None = None) -> Opened:
        """The validation data of an earlier run, to evaluate on again. Nothing is rebuilt.

        Args:
            stores: the `Store`s in the run's config.json.

        Raises:
            DataError: they do not exist any more.
        """

    @abc.abstractmethod
    def elsewhere(self, place: str, tokenizer: Path, labels: Sequence[str] = ()) -> Data:
        """The same kind of data, with the validation split read from `place`: a folder, URL or file.

        Args:
            tokenizer, labels: folder with the tokenizer of the model that is evaluated, and its labels; used if
                `place` holds text and not ids.
        """

    def identity(self) -> dict[str, Any]:
        """This value as JSON, without the locations of files, for the experiment's identity. Their contents are part of
        the fingerprints of `Opened.stores`."""
        return to_json(self)

    def empty(self, rows: int) -> Batch:
        """A batch of padding with this many rows: numpy zeros, in the shapes that `Opened` gives."""
        return empty_batch(rows, self.length)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One store of a mixture."""

    source: str | Recipe
    """A token store (folder or URL), a recipe file (.py), or a recipe: recipes are built when first needed"""
    weight: float = 1.0
    """Share of the sequences, relative to the other parts"""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise DataError(f"Part.weight is {self.weight}; expected a number above 0 (leave a part out instead of 0)")


@dataclass(frozen=True, kw_only=True)
class PackedText(Data):
    """A mixture of token stores, cut into sequences and shuffled globally."""

    train: tuple[Part, ...]
    validation: tuple[Part, ...] = ()
    """Stores whose validation split is evaluated on; empty means those of `train`"""
    length: int = 512
    """Tokens a sequence"""
    batch: int = 16
    """Sequences a step, over all hosts"""
    packing: Packing = field(default_factory=BestFit)
    weighting: Weighting = field(default_factory=EveryToken)
    """Which tokens count in the loss: every one, or those after a marker"""
    extra: Extra = field(default_factory=NoExtra)
    """Additional arrays of each batch, such as targets of a teacher"""
    seed: int = 0
    """Seed of the order of the sequences, which differs in each epoch"""

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError("data.train is empty; give at least one Part")
        super().__post_init__()
        check_seed(self.seed)

    def open(self, *, cache: str | Path | None = None, progress: Progress | None = None) -> OpenedText:
        """
        Raises:
            DataError: a store is missing or damaged, or their tokenizers differ.
        """
        from slmjax.data.loader import open_text

        return open_text(self, cache=cache, progress=progress)

    def reopen(self, stores: Sequence[Mapping[str, Any]], *, cache: str | Path | None = None) -> OpenedText:
        """Its validation stores only, at the locations that the run recorded; recipes are not built again. Without
        `extra`, which training alone reads."""
        places = [str(store["location"]) for store in stores][len(self.train) :]
        weights = [part.weight for part in self.validation or self.train]
        parts = tuple(Part(source=_path(a), weight=w) for a, w in zip(places, weights, strict=True))
        return replace(self, train=parts, validation=(), extra=NoExtra()).open(cache=cache)

    def elsewhere(self, place: str, tokenizer: Path, labels: Sequence[str] = ()) -> PackedText:
        """`place` is a token store, whose own tokenizer is used."""
        return replace(self, train=(Part(source=place),), validation=(), extra=NoExtra())

    def identity(self) -> dict[str, Any]:
        described = to_json(self)
        for part in (*described["train"], *described["validation"]):
            del part["source"]
        return {**described, "extra": self.extra.identity()}

    def empty(self, rows: int) -> Batch:
        return added(super().empty(rows), self.extra)


def check_seed(seed: int) -> None:
    """
    Raises:
        DataError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 32:
        raise DataError(f"data.seed is {seed}; expected 0 to {(1 << 32) - 1}")


def _path(location: str) -> str:
    return location.removeprefix("file://") if location.startswith("file://") else location
