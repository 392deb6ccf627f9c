"""What the stages of a build share: the folder they work in, processes, and files written atomically."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from slmjax.data.recipe import Recipe
from slmjax.errors import DataError

PART_BYTES = 2 << 20  # text: about a second of work, so that all processes finish at about the same time


Progress: TypeAlias = Callable[[str, int, int | None], None]
"""(stage, done, total or None where it is not known yet)"""


def silent(stage: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The settings of a build, which every stage reads."""

    recipe: Recipe
    folder: Path
    workers: int
    show: Progress
    shard: int
    part_bytes: int

    @property
    def quiet(self) -> Context:
        """A copy to send to a worker process, without the function that shows progress."""
        return replace(self, show=silent)

    def part(self, stage: str, index: int, suffix: str = "npz") -> Path:
        """The file of one part."""
        return self.folder / stage / f"{index:06d}.{suffix}"


def run(context: Context, function: Callable, tasks: Iterable[tuple]) -> Iterator[Any]:
    """Results in the order of the tasks: in this process if there is one task or one worker, else in several."""
    tasks = iter(tasks)
    head = list(itertools.islice(tasks, 2))
    if context.workers == 1 or len(head) < 2:
        yield from (function(*task) for task in itertools.chain(head, tasks))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would break the threads of jax and TensorStore
    with ProcessPoolExecutor(context.workers, spawn, _begin_worker) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for task in itertools.chain(head, tasks):
                waiting.append(pool.submit(function, *task))
                if len(waiting) > 2 * context.workers:  # what has been read ahead stays bounded
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            message = "a worker process died, most likely for lack of memory; run again with fewer --workers to go on"
            raise DataError(message) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough
    parent = multiprocessing.parent_process()

    def follow() -> None:  # a killed build takes its workers along
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_bytes(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    building = path.with_name(path.name + ".tmp")
    building.write_bytes(content)
    os.replace(building, path)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An .npz file, uncompressed."""
    building = path.with_name(path.name + ".tmp")
    with open(building, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(building, path)
