"""Batches for training and evaluation, through Grain.

The order is a pure function of (stores, seed, global sequence number): sequence n of the run is sequence
`permutation(part, epoch)[k]` of one part, where the permutation is Grain's `index_shuffle` (a small block cipher: no
array of the corpus' size exists). The whole state is therefore n. Host h of H reads a contiguous part of each global
batch: hosts may come and go between runs, and no sequence is repeated or dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.data import mixture
from slmjax.data.build import cache_folder, open_source
from slmjax.data.recipe import describe
from slmjax.data.rows import Rows, assemble
from slmjax.data.spec import PackedText, Part
from slmjax.data.token_store import TokenStore
from slmjax.data.work import Progress
from slmjax.errors import DataError, UserError
from slmjax.types import Batch

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ReadThreads:
    """Read ahead in threads: right unless reading is far away or tokens are few."""

    count: int = 2
    """Threads"""
    batches: int = 4
    """Batches held ready"""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class ReadProcesses:
    """Read ahead in processes, where Python itself is what is slow."""

    count: int = 2
    """Processes"""
    batches: int = 4
    """Batches held ready by each process"""

    def __post_init__(self) -> None:
        _check(self)


def _check(reader: ReadThreads | ReadProcesses) -> None:
    for name in ("count", "batches"):
        if getattr(reader, name) < 1:
            raise UserError(f"reader.{name} is {getattr(reader, name)}; expected at least 1")


class _HostBatches:
    """Grain's random-access source: item k is this host's part of the global batch that starts at first + k * batch."""

    def __init__(
        self, parts: list[Rows], shares: tuple[Fraction, ...], data: PackedText, first: int, host: int, hosts: int
    ):
        self.parts, self.shares, self.first = parts, shares, first
        self.seed, self.length, self.global_batch = data.seed, data.length, data.batch
        self.size = data.batch // hosts
        self.offset = host * self.size

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that reads ahead: it ends with the one that trains, even if that is killed."""
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

    def __len__(self) -> int:
        return (1 << 62) // self.global_batch

    def __getitem__(self, index: Any) -> Batch:
        start = self.first + int(index) * self.global_batch + self.offset
        return assemble([self.locate(n) for n in range(start, start + self.size)], self.length)

    def locate(self, n: int) -> tuple[Rows, int]:
        """Global sequence n -> its part, and its row there."""
        part, k = mixture.locate(self.shares, n)
        rows = self.parts[part]
        epoch, k = divmod(k, rows.count)
        return rows, shuffled(k, rows.count, (self.seed, part, epoch))


def shuffled(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a keyed permutation of range(size) sends `index`, without storing the permutation."""
    from grain.experimental import index_shuffle

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)


class Loader:
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
        prefetch: ReadThreads | ReadProcesses | None = None,
        cache: str | Path | None = None,
    ):
        """
        Args:
            stores: those of `data.train`, in order (`open_stores`).
            cache: folder for packing plans, reused by later runs.

        Raises:
            DataError: the batch cannot be split over the hosts, or the stores have different tokenizers.
        """
        if not 0 <= host < hosts or data.batch % hosts:
            raise DataError(f"data.batch is {data.batch}; it must be a multiple of the number of hosts, {hosts}")
        check_tokenizers(stores)
        self.data, self.stores, self.host, self.hosts = data, tuple(stores), host, hosts
        self._prefetch = prefetch or ReadThreads()
        self._parts = [Rows(s, "train", data.packing, data.length, cache_folder(cache)) for s in stores]
        self._shares = mixture.shares([p.weight for p in data.train])
        self._next = 0
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._next += self.data.batch
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the batch given last, the same on every host. JSON.

        `next` is the whole position; `epoch` (over all parts) is for people, the rest is checked by `restore`."""
        epoch = self._next / sum(self.sequences)
        return {"version": STATE_VERSION, "next": self._next, "epoch": epoch, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was last when `state` was taken, by any number of hosts.

        Raises:
            DataError: the stores, mixture, packing, length or seed are others, so that the position means nothing.
        """
        mine = {"version": STATE_VERSION, **self._identity()}
        for name, value in mine.items():
            if state.get(name) != value:
                raise DataError(f"data of the checkpoint differs in {name}: it has {state.get(name)}, this run {value}")
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        """Stop reading ahead. The loader goes on from its position if asked for more."""
        close = getattr(self._batches, "close", None)
        self._batches = None
        if close is not None:
            close()

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences in one epoch of each part."""
        return tuple(part.count for part in self._parts)

    def epochs(self) -> tuple[float, ...]:
        """How often each part has been read so far: 1.25 is once, and a quarter of the second time."""
        counts = mixture.drawn(self._shares, self._next)
        return tuple(n / part.count for n, part in zip(counts, self._parts, strict=True))

    def _identity(self) -> dict[str, Any]:
        return {
            "stores": [s.fingerprint for s in self.stores],
            "shares": [str(share) for share in self._shares],
            "packing": describe(self.data.packing),
            "length": self.data.length,
            "seed": self.data.seed,
        }

    def _start(self) -> Iterator[Batch]:
        import grain

        source = _HostBatches(self._parts, self._shares, self.data, self._next, self.host, self.hosts)
        how = self._prefetch
        reads = grain.ReadOptions(num_threads=how.count, prefetch_buffer_size=how.batches)
        if isinstance(how, ReadThreads):
            return iter(grain.MapDataset.source(source).to_iter_dataset(reads))
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers are handed the flags of absl, which nobody else parses
        options = grain.MultiprocessingOptions(num_workers=how.count, per_worker_buffer_size=how.batches)
        single = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return iter(grain.MapDataset.source(source).to_iter_dataset(single).mp_prefetch(options))


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
    if size % hosts:
        raise DataError(f"a validation batch of {size} cannot be split over {hosts} hosts")
    check_tokenizers(stores)
    parts = [Rows(s, "validation", data.packing, data.length, cache_folder(cache)) for s in stores]
    shares = mixture.shares([p.weight for p in data.validation or data.train])
    order = []
    limit = None if count is None else count * size
    total = sum(p.count for p in parts)
    n = 0
    while len(order) < (total if limit is None else min(limit, total)):
        part, k = mixture.locate(shares, n)
        n += 1
        if k < parts[part].count:
            order.append((parts[part], shuffled(k, parts[part].count, (0, part, 0))))
    for start in range(host * size // hosts, -(-len(order) // size) * size, size):
        yield assemble(order[start : start + size // hosts], data.length, size // hosts)
