"""Labelled text for classifiers: one text and its label in each row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from slmjax.data.build import cache_folder
from slmjax.data.labelled_files import files_of
from slmjax.data.labelled_store import ABOUT, VERSION, make
from slmjax.data.recipe import digest
from slmjax.data.spec import Data, Opened, Store, check_seed
from slmjax.data.stream import Prefetch, Stream, host_rows, shuffled
from slmjax.data.tokenizer import BPE, File, Tokenizer, TokenizerSpec
from slmjax.data.work import Progress, silent
from slmjax.errors import DataError
from slmjax.serialise import to_json
from slmjax.types import Batch


@dataclass(frozen=True, kw_only=True)
class LabelledText(Data):
    """One text and its label in each row: `tokens` padded on the right, weight 1 at the first position only, so that
    the weight of a batch is its number of texts, and `extra["labels"]`, int32 [B].

    The texts are tokenised once, into a folder that later runs use again. Tokenising holds all of them in memory.
    """

    train: tuple[str, ...]
    """Files (.csv, .jsonl, also .gz or .zst; .parquet), globs relative to the working directory, or a Python file that
    fetches them (`labelled_files.files_of`)"""
    validation: tuple[str, ...] = ()
    """Files that are evaluated on; empty: `held_out` of the training rows"""
    held_out: float = 0.1
    """Share of the training rows that is evaluated on where there are no files for it, by a hash of the text: equal
    texts are in the same split, and adding rows later moves no other row"""
    text: str = "text"
    """Column of the text"""
    label: str = "label"
    """Column of the label: strings or whole numbers"""
    labels: tuple[str, ...] = ()
    """The labels in the order of their numbers; empty: those of the training rows, sorted"""
    tokenizer: TokenizerSpec = field(default_factory=BPE)
    """Trained on the training texts, or `File(path=...)`, relative to the working directory"""
    closed: bool = True
    """Whether EOS is appended to a text, as encoders expect. False for decoders, whose head reads the last token: stock
    `transformers` pads with EOS and would take it for padding"""
    length: int = 256
    """Tokens a text; longer ones are cut, and the log says how many"""
    batch: int = 32
    """Texts a step, over all hosts"""
    seed: int = 0
    """Seed of the order of the texts, which differs in each epoch"""
    name: str = ""
    """Name in logs and on the model card; empty: that of the first file"""
    licence: str = ""
    """Of the texts, for the model card"""
    origin: str = ""
    """Where the texts were taken from, for the model card"""
    next_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if not self.train and not self.validation:
            raise DataError("data.train is empty; name at least one file")
        if not 0 <= self.held_out < 1:
            raise DataError(f"data.held_out is {self.held_out}; expected a share of the rows in [0, 1)")
        if len(set(self.labels)) < len(self.labels):
            raise DataError(f"data.labels is {', '.join(self.labels)}; give names that differ")

    def open(self, *, cache: str | Path | None = None, progress: Progress | None = None) -> OpenedLabelled:
        """
        Raises:
            DataError: see `labelled_files.examples`; also a label that is not among `labels`, or none to train on.
        """
        root = cache_folder(cache)
        train, validation = files_of(self.train, root), files_of(self.validation, root)
        groups = (train, validation, self.tokenizer.files(Path()))
        stats = [[(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in group] for group in groups]
        # the fields that change nothing in the folder; `stats` stands for the files
        unused = {"train": ("",), "validation": (), "length": 2, "batch": 1, "seed": 0, "closed": True}
        key = digest([VERSION, to_json(replace(self, **unused)), stats])[:12]
        plain = re.sub(r"[^\w.-]+", "_", self.title)
        folder = root / "labelled" / f"{plain}-{key}"
        if not (folder / ABOUT).is_file():
            make(self, train, validation, folder, progress or silent)
        return OpenedLabelled(self, folder)

    def reopen(self, stores: Sequence[Mapping[str, Any]], *, cache: str | Path | None = None) -> OpenedLabelled:
        folder = Path(stores[-1]["location"])
        if not (folder / ABOUT).is_file():
            raise DataError(f"{folder}: the tokenised texts of this run are gone; name a file of texts with --data")
        return OpenedLabelled(self, folder)

    def elsewhere(self, place: str, tokenizer: Path, labels: Sequence[str] = ()) -> LabelledText:
        names = tuple(labels) or self.labels
        return replace(self, train=(), validation=(place,), name="", labels=names, tokenizer=File(path=str(tokenizer)))

    def identity(self) -> dict[str, Any]:
        """Without files and tokenizer, whose contents are part of the fingerprints of `Opened.stores`."""
        where = ("train", "validation", "tokenizer", "name", "licence", "origin")
        return {name: value for name, value in to_json(self).items() if name not in where}

    def empty(self, rows: int) -> Batch:
        return super().empty(rows)._replace(extra={"labels": np.zeros(rows, np.int32)})  # pyright: ignore

    @property
    def title(self) -> str:
        """The name shown to people."""
        return self.name or Path((*self.train, *self.validation)[0]).name.split(".")[0].replace("*", "all")


class Texts:
    """One split of a folder of tokenised texts. Its arrays are opened on first use, so that it can be sent to another
    process."""

    def __init__(self, data: LabelledText, folder: Path, split: str, tokenizer: Tokenizer):
        self.data, self.folder, self.split = data, folder, split
        after = tokenizer.eos_id if data.closed else None
        self.before, self.after = (np.array([] if i is None else [i], np.int32) for i in (tokenizer.bos_id, after))
        self._arrays: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all texts one after another, where each begins [texts + 1], the index of each label [texts]."""
        if self._arrays is None:
            names = (self.folder / f"{self.split}_{what}.npy" for what in ("tokens", "offsets", "labels"))
            self._arrays = tuple(np.load(name, mmap_mode="r") for name in names)
        return self._arrays

    @property
    def count(self) -> int:
        return len(self.arrays()[2])

    @property
    def cut(self) -> int:
        """Number of texts that are longer than a row."""
        room = self.data.length - len(self.before) - len(self.after)
        return int((np.diff(self.arrays()[1]) > room).sum())

    def rows(self, numbers: Sequence[int], size: int) -> Batch:
        """These texts as one batch of `size` rows; rows beyond them are padding."""
        tokens, offsets, labels = self.arrays()
        out = self.data.empty(size)
        room = self.data.length - len(self.before) - len(self.after)
        for i, number in enumerate(numbers):
            start, stop = int(offsets[number]), int(offsets[number + 1])
            ids = np.concatenate([self.before, tokens[start : min(stop, start + room)], self.after])
            out.tokens[i, : len(ids)] = ids
            out.segment_ids[i, : len(ids)] = 1
            out.positions[i, : len(ids)] = np.arange(len(ids))
            out.weights[i, 0] = 1.0
            out.extra["labels"][i] = labels[number]
        return out

    def __call__(self, numbers: range) -> Batch:
        """Texts of the training stream by global number."""
        epochs = (divmod(n, self.count) for n in numbers)
        return self.rows([shuffled(k, self.count, (self.data.seed, 0, epoch)) for epoch, k in epochs], len(numbers))


@dataclass(frozen=True)
class OpenedLabelled(Opened):
    """Labelled text, tokenised and ready to be read."""

    data: LabelledText
    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """The content of about.json: labels, vocabulary, splits and fingerprints"""
        return json.loads((self.folder / ABOUT).read_text("utf-8"))

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def stores(self) -> tuple[Store, ...]:
        licence = {"licence": self.about["licence"] or None, "url": self.about["origin"] or None}
        return tuple(
            Store(
                name=self.name,
                location=str(self.folder.resolve()),
                fingerprint=self.about["splits"][split]["fingerprint"],
                split=split,
                tokens=self.about["splits"][split]["tokens"],
                share=1.0 if split == "train" else None,
                sources=({"name": self.name, **licence, "documents": self.about["splits"][split]["texts"]},),
            )
            for split in ("train", "validation")
        )

    @property
    def notes(self) -> tuple[str, ...]:
        train, held_out = self._texts("train"), self._texts("validation")
        names = ", ".join(self.labels)
        return (
            f"{train.count:,} texts to train on, {held_out.count:,} held out; labels: {names}; "
            f"{train.cut + held_out.cut:,} texts are longer than {self.data.length} tokens and are cut",
        )

    @property
    def vocab(self) -> int:
        return self.about["vocab"]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.about["labels"])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder, bos=self.about["bos"] or "", eos=self.about["eos"] or "")

    @property
    def tokenizer_path(self) -> Path:
        return self.folder

    def epochs(self, sequences: int) -> float:
        return sequences / max(1, self._texts("train").count)

    def training(self, *, host: int = 0, hosts: int = 1, reader: Prefetch | None = None) -> Stream:
        texts = self._texts("train")
        if not texts.count:
            raise DataError(f"{self.name}: no text to train on; name files in data.train, or lower data.held_out")
        identity = {
            "texts": self.about["splits"]["train"]["fingerprint"],
            "length": self.data.length,
            "closed": self.data.closed,
            "seed": self.data.seed,
        }
        return Stream(
            texts,
            batch=self.data.batch,
            epoch=texts.count,
            identity=identity,
            host=host,
            hosts=hosts,
            prefetch=reader,
        )

    @property
    def has_validation(self) -> bool:
        return self._texts("validation").count > 0

    def validation(self, batches: int | None = None, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        texts, size = self._texts("validation"), self.data.batch
        count = texts.count if batches is None else min(texts.count, batches * size)
        order = [shuffled(k, texts.count, (0, 0, 0)) for k in range(count)]
        return (texts.rows(rows, size // hosts) for rows in host_rows(order, size, host=host, hosts=hosts))

    def _texts(self, split: str) -> Texts:
        return Texts(self.data, self.folder, split, self.tokenizer())
