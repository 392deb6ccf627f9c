"""An endless stream of batches whose whole position is one number, read ahead through Grain.

What a batch holds is a pure function of global sequence numbers: sequence n of the run is the same on every host. Host
h of H reads a contiguous part of each global batch: hosts may come and go between runs, and no sequence is repeated or
dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from slmjax.errors import DataError, UserError
from slmjax.types import Batch

T = TypeVar("T")

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ReadThreads:
    """Read ahead in threads: fast enough unless Python itself is the bottleneck."""

    count: int = 2
    """Threads"""
    batches: int = 4
    """Batches held ready"""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class ReadProcesses:
    """Read ahead in processes, for data where Python itself is the bottleneck."""

    count: int = 2
    """Processes"""
    batches: int = 4
    """Batches held ready by each process"""

    def __post_init__(self) -> None:
        _check(self)


Prefetch = ReadThreads | ReadProcesses


def _check(reader: Prefetch) -> None:
    for name in ("count", "batches"):
        if getattr(reader, name) < 1:
            raise UserError(f"reader.{name} is {getattr(reader, name)}; expected at least 1")


class _HostBatches:
    """Grain's random-access source: item k is this host's part of the global batch that starts at first + k * batch."""

    def __init__(self, read: Callable[[range], Batch], first: int, batch: int, host: int, hosts: int):
        self.read, self.first, self.global_batch = read, first, batch
        self.size = batch // hosts
        self.offset = host * self.size

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that reads ahead: makes it end with the training process, even if that is killed."""
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

    def __len__(self) -> int:
        return (1 << 62) // self.global_batch

    def __getitem__(self, index: Any) -> Batch:
        start = self.first + int(index) * self.global_batch + self.offset
        return self.read(range(start, start + self.size))


def shuffled(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a keyed permutation of range(size) sends `index`, without storing the permutation (Grain's `index_shuffle`,
    a small block cipher)."""
    from grain.experimental import index_shuffle

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)


class Stream:
    """An endless iterator of this host's batches, with its position as JSON (`types.BatchStream`)."""

    def __init__(
        self,
        read: Callable[[range], Batch],
        *,
        batch: int,
        epoch: float,
        identity: Mapping[str, Any],
        host: int = 0,
        hosts: int = 1,
        prefetch: Prefetch | None = None,
    ):
        """
        Args:
            read: global sequence numbers -> these rows; pure, and can be sent to another process.
            batch: sequences a step, over all hosts.
            epoch: sequences in one pass over the data.
            identity: JSON: data, order and length, which a position refers to. Kept in the state, checked by `restore`.

        Raises:
            DataError: the batch cannot be split over the hosts.
        """
        if not 0 <= host < hosts or batch % hosts:
            raise DataError(f"data.batch is {batch}; it must be a multiple of the number of hosts, {hosts}")
        self.host, self.hosts = host, hosts
        self._read, self._batch, self._epoch, self._identity = read, batch, epoch, dict(identity)
        self._prefetch = prefetch or ReadThreads()
        self._next = 0
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._next += self._batch
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch that was returned, the same on every host. JSON.

        `next` is the whole position; `epoch` is for logs, the rest is checked by `restore`."""
        return {"version": STATE_VERSION, "next": self._next, "epoch": self._next / self._epoch, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch before `state` was taken, on any number of hosts.

        Raises:
            DataError: the data, their order or the length differ, so that the position does not apply.
        """
        expected = {"version": STATE_VERSION, **self._identity}
        for name, value in expected.items():
            if state.get(name) != value:
                raise DataError(f"data of the checkpoint differs in {name}: it has {state.get(name)}, this run {value}")
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        """Stop reading ahead. The next batch is read again from the current position."""
        close = getattr(self._batches, "close", None)
        self._batches = None
        if close is not None:
            close()

    def _start(self) -> Iterator[Batch]:
        import grain

        source = _HostBatches(self._read, self._next, self._batch, self.host, self.hosts)
        how = self._prefetch
        reads = grain.ReadOptions(num_threads=how.count, prefetch_buffer_size=how.batches)
        if isinstance(how, ReadThreads):
            return iter(grain.MapDataset.source(source).to_iter_dataset(reads))
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers are handed the flags of absl, which nothing else here parses
        options = grain.MultiprocessingOptions(num_workers=how.count, per_worker_buffer_size=how.batches)
        single = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return iter(grain.MapDataset.source(source).to_iter_dataset(single).mp_prefetch(options))


def host_rows(rows: Sequence[T], size: int, *, host: int = 0, hosts: int = 1) -> Iterator[Sequence[T]]:
    """This host's part of each batch of `size` rows in order; the last batch may give it fewer, or none.

    Raises:
        DataError: a batch cannot be split over the hosts.
    """
    if size % hosts:
        raise DataError(f"a validation batch of {size} cannot be split over {hosts} hosts")
    each = size // hosts
    for start in range(host * each, -(-len(rows) // size) * size, size):
        yield rows[start : start + each]
