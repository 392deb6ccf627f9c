"""What a row of metrics says of the batch and of the machine, and what is kept of a bad step."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from slmjax.types import Batch


def keep(folder: Path, batch: Batch, row: Mapping[str, float], position: Any) -> None:
    """Writes this process's part of a bad step: its batch (.npz), its metrics and the position of its data (.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"batch-{jax.process_index()}.npz", **arrays(batch))
    finite = {name: x if math.isfinite(x) else str(x) for name, x in row.items()}
    (folder / f"metrics-{jax.process_index()}.json").write_text(json.dumps({**finite, "data": position}, indent=1))


def arrays(batch: Batch) -> dict[str, Any]:
    """{name: array} of a batch, including those of `extra`."""
    return {name: x for name, x in batch._asdict().items() if name != "extra"} | dict(sorted(batch.extra.items()))


def batch_hash(batch: Batch, first: int = 0) -> int:
    """The sum of 48 bits of xxh3 of each row of each array, modulo 2^48 (exact in a float64).

    A row's hash is seeded with its number and continues that of the row in the array before. `first` is the number of
    the first row, so that the hash of a batch is the sum of those of its parts."""
    contiguous = [np.ascontiguousarray(x) for x in arrays(batch).values()]

    def of_row(i: int) -> int:
        seed = first + i
        for x in contiguous:
            seed = xxhash.xxh3_64_intdigest(x[i].tobytes(), seed=seed)
        return seed >> 16

    return sum(map(of_row, range(len(batch.tokens)))) % 2**48


def memory_bytes() -> int:
    """Peak memory in bytes: of the fullest device if devices report it, else of this process."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
