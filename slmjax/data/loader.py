"""Batches of packed text, for training and evaluation.

The order is a pure function of (stores, seed, global sequence number): sequence n of the run is sequence
`permutation(part, epoch)[k]` of one part; no array of the corpus' size exists. `stream.Stream` reads
ahead and keeps the position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from slmjax.data import mixture
from slmjax.data.build import cache_folder, open_source
from slmjax.data.extra import Extra, added
from slmjax.data.records import lines
from slmjax.data.rows import Rows, assemble, origins
from slmjax.data.spec import Opened, PackedText, Part, Store
from slmjax.data.stream import Prefetch, ReadProcesses, ReadThreads, Stream, host_rows, shuffled
from slmjax.data.token_store import Split, TokenStore
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.weighting import Weighting
from slmjax.data.work import Progress
from slmjax.errors import DataError
from slmjax.serialise import to_json
from slmjax.types import Batch

__all__ = ["Loader", "OpenedText", "ReadProcesses", "ReadThreads", "open_stores", "shuffled", "validation_batches"]


@dataclass(frozen=True)
class _Sequences:
    """Global sequence numbers -> a batch."""

    parts: tuple[Rows, ...]
    shares: tuple[Fraction, ...]
    seed: int
    length: int
    weighting: Weighting
    extra: Extra

    def __call__(self, numbers: range) -> Batch:
        rows = [self.locate(n) for n in numbers]
        batch = assemble(rows, self.length, weighting=self.weighting)
        return added(batch, self.extra, functools.partial(origins, rows))

    def locate(self, n: int) -> tuple[Rows, int]:
        """Global sequence n -> its part, and its row there."""
        part, k = mixture.locate(self.shares, n)
        rows = self.parts[part]
        epoch, k = divmod(k, rows.count)
        return rows, shuffled(k, rows.count, (self.seed, part, epoch))


class Loader(Stream):
    """An endless iterator of this host's batches, with its position as JSON.

    Each item is a `types.Batch` of numpy arrays [data.batch / hosts, data.length].
    """

    def __init__(
        self,
        data: PackedText,
        stores: Sequence[TokenStore],
        *,
        host: int = 0,
        hosts: int = 1,
        prefetch: Prefetch | None = None,
        cache: str | Path | None = None,
    ):
        """
        Args:
            stores: those of `data.train`, in order (`open_stores`).
            cache: folder for packing plans, reused by later runs.

        Raises:
            DataError: the batch cannot be split over the hosts, or the stores have different tokenizers.
        """
        check_tokenizers(stores)
        self._parts = tuple(Rows(s, "train", data.packing, data.length, cache_folder(cache)) for s in stores)
        self._shares = mixture.shares([p.weight for p in data.train])
        super().__init__(
            _Sequences(self._parts, self._shares, data.seed, data.length, data.weighting, data.extra),
            batch=data.batch,
            epoch=epoch_of(stores, self._parts, [p.weight for p in data.train]),
            identity={
                "stores": [s.fingerprint for s in stores],
                "shares": [str(share) for share in self._shares],
                "packing": to_json(data.packing),
                "length": data.length,
                "seed": data.seed,
            },
            host=host,
            hosts=hosts,
            prefetch=prefetch,
        )

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in one epoch of each part."""
        return tuple(part.count for part in self._parts)

    def epochs(self) -> tuple[float, ...]:
        """How often each part has been read so far: 1.25 is once, and a quarter of the second time."""
        counts = mixture.drawn(self._shares, self._next)
        return tuple(n / part.count for n, part in zip(counts, self._parts, strict=True))


def epoch_of(stores: Sequence[TokenStore], parts: Sequence[Rows], weights: Sequence[float]) -> float:
    """Sequences of the mixture that hold as many tokens as the stores together: tokens, for a sequence is padded as far
    as the documents of its store leave it empty. Of one store, that is its number of sequences."""
    tokens = [store.count("train", "tokens") for store in stores]
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    each = sum(weight * n / part.count for weight, n, part in zip(exact, tokens, parts, strict=True)) / sum(exact)
    return float(sum(tokens) / each)


def open_stores(
    parts: Sequence[Part], *, cache: str | Path | None = None, progress: Progress | None = None
) -> tuple[TokenStore, ...]:
    """The store of each part; recipes are built into the cache if they are not there.

    Raises:
        DataError: a store is missing or damaged, or their tokenizers differ.
    """
    stores = tuple(open_source(part.source, cache, progress) for part in parts)
    check_tokenizers(stores)
    return stores


def check_tokenizers(stores: Sequence[TokenStore]) -> None:
    """
    Raises:
        DataError: two stores were written by different tokenizers.
    """
    for other in stores[1:]:
        if other.tokenizer_fingerprint != stores[0].tokenizer_fingerprint:
            raise DataError(
                f"{other.name} and {stores[0].name} were written by different tokenizers; "
                "build both with the same tokenizer.json (tokenizer=File(path=...))"
            )


def validation_batches(
    data: PackedText,
    stores: Sequence[TokenStore],
    count: int | None = None,
    *,
    host: int = 0,
    hosts: int = 1,
    batch: int | None = None,
    cache: str | Path | None = None,
) -> Iterator[Batch]:
    """The same batches every time, from the validation splits: each sequence at most once, padded with weight 0.

    Args:
        stores: those of `data.validation`, or of `data.train` where it is empty.
        count: at most this many batches; None reads every sequence.
        batch: sequences over all hosts; default `data.batch`.
    """
    size = batch or data.batch
    check_tokenizers(stores)
    parts = [Rows(s, "validation", data.packing, data.length, cache_folder(cache)) for s in stores]
    shares = mixture.shares([p.weight for p in data.validation or data.train])
    order: list[tuple[Rows, int]] = []
    limit = None if count is None else count * size
    total = sum(p.count for p in parts)
    n = 0
    while len(order) < (total if limit is None else min(limit, total)):
        part, k = mixture.locate(shares, n)
        n += 1
        if k < parts[part].count:
            order.append((parts[part], shuffled(k, parts[part].count, (0, part, 0))))
    for rows in host_rows(order, size, host=host, hosts=hosts):
        filled = assemble(rows, data.length, size // hosts, weighting=data.weighting)
        yield added(filled, data.extra, functools.partial(origins, rows))


@dataclass(frozen=True)
class OpenedText(Opened):
    """Packed text with its token stores opened."""

    data: PackedText
    train: tuple[TokenStore, ...]
    held_out: tuple[TokenStore, ...]
    """Stores whose validation splits are read"""
    cache: str | Path | None = None

    @property
    def name(self) -> str:
        return ", ".join(store.name for store in self.train)

    @property
    def vocab(self) -> int:
        return max(store.vocab for store in (*self.train, *self.held_out))

    @property
    def stores(self) -> tuple[Store, ...]:
        weights = [part.weight for part in self.data.train]
        shares = (weight / sum(weights) for weight in weights)
        return (
            *(_described(store, "train", share) for store, share in zip(self.train, shares, strict=True)),
            *(_described(store, "validation", None) for store in self.held_out),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        stores = {store.fingerprint: store for store in (*self.train, *self.held_out)}.values()
        said = (line for store in stores for line in lines(store.manifest.get("sources", ())))
        return (*said, *self.data.extra.notes(self.data.length))

    def tokenizer(self) -> Tokenizer:
        return self.train[0].tokenizer()

    @property
    def tokenizer_path(self) -> Path:
        return self.train[0].tokenizer_path

    def epochs(self, sequences: int) -> float:
        data, cache = self.data, cache_folder(self.cache)
        parts = [Rows(store, "train", data.packing, data.length, cache) for store in self.train]
        return sequences / epoch_of(self.train, parts, [part.weight for part in data.train])

    def training(self, *, host: int = 0, hosts: int = 1, reader: Prefetch | None = None) -> Loader:
        return Loader(self.data, self.train, host=host, hosts=hosts, prefetch=reader, cache=self.cache)

    @property
    def has_validation(self) -> bool:
        return all(store.count("validation", "tokens") for store in self.held_out)

    def validation(self, batches: int | None = None, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        return validation_batches(self.data, self.held_out, batches, host=host, hosts=hosts, cache=self.cache)


def open_text(data: PackedText, *, cache: str | Path | None, progress: Progress | None) -> OpenedText:
    """The stores of `data`; recipes are built into the cache if they are not there.

    Raises:
        DataError: a store is missing or damaged, or their tokenizers differ.
        UserError: `data.extra` has no arrays for one of them.
    """
    train = open_stores(data.train, cache=cache, progress=progress)
    held_out = open_stores(data.validation, cache=cache, progress=progress) or train
    data.extra.fits((*train, *held_out))
    return OpenedText(data, train, held_out, cache)


def _described(store: TokenStore, split: Split, share: float | None) -> Store:
    """What a run's config.json holds about a store."""
    sources = tuple(
        {
            "name": source["name"],
            "licence": source.get("licence"),
            "url": origin if (origin := str(source.get("origin") or "")).startswith("https://") else None,
            "documents": source.get("documents_kept"),
        }
        for source in store.manifest.get("sources", ())
    )
    return Store(
        name=store.name,
        location=store.location,
        fingerprint=store.fingerprint,
        split=split,
        tokens=store.count(split, "tokens"),
        share=share,
        sources=sources,
    )
