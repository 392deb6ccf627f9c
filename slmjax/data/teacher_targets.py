"""The predictions of a teacher that were written to disk, and how they join the batches of a run.

`slmjax data teacher` writes a folder beside a token store:

```
settings.json          what is computed: data, tokenizer, teacher, kind of targets; written first
done/                  for each shard, the hashes of its files: it is complete once this says so
manifest.json          the hash of every file, bytes a token and measured errors; written last
train/NAME/            each column (data/columns.py) of all tokens of the split, one token after another
validation/NAME/
head/                  of `hidden`: the teacher's output table, as a MODEL
```
Token i of a split has its targets at i: the teacher's prediction of what follows it. The teacher reads each document by
itself, in windows of `length` tokens from the document's start (the last may be shorter), so token i is predicted from
the tokens of its window up to i. A run whose `data.length` is the same and whose packing is `BestFit` cuts documents at
the same places, and a teacher that runs in its steps sees the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from slmjax.data.columns import Column
from slmjax.data.extra import Extra, Origin
from slmjax.data.token_store import MANIFEST, SPLITS, Array, Split, TokenStore, files_of, read_file, url_of
from slmjax.errors import DataError, UserError
from slmjax.serialise import from_json
from slmjax.types import Batch

SETTINGS = "settings.json"
FORMAT = "slmjax teacher targets"
VERSION = 1
CHUNK_TOKENS = 128
"""Tokens of one chunk: what a random read costs at least"""


class TargetStore:
    """A finished folder of targets. Cheap to open: it reads the manifest and nothing else."""

    def __init__(self, location: str):
        """
        Raises:
            UserError: there are no targets, or they are not complete.
            DataError: the manifest is damaged.
        """
        self.location = url_of(location)
        files = files_of(location)
        raw = read_file(files, MANIFEST)
        if raw is None:
            if read_file(files, SETTINGS) is not None:
                raise UserError(
                    f"{location}: the targets there are not complete (no {MANIFEST}); run the same `slmjax data "
                    "teacher` command again to go on"
                )
            raise UserError(f"{location}: no targets of a teacher there; write them with `slmjax data teacher`")
        try:
            self.manifest: dict[str, Any] = json.loads(raw)
            if (self.manifest.get("format"), self.manifest.get("version")) != (FORMAT, VERSION):
                raise UserError(f"{location}: {MANIFEST} is not of format {FORMAT!r}, version {VERSION}")
            self.columns: dict[str, Column] = {n: from_json(x) for n, x in self.manifest["columns"].items()}
            self.fingerprint: str = self.manifest["fingerprint"]
            self.data: str = self.manifest["data"]["fingerprint"]
            shard = self.manifest["shard"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{location}: {MANIFEST} is damaged: {error}") from error
        self._arrays = {split: arrays_of(self.location, self.columns, split, shard) for split in SPLITS}

    def read(self, split: Split, index: np.ndarray) -> Mapping[str, np.ndarray]:
        """The targets of tokens of a split.

        Args:
            index: int64 [n], n > 0.

        Returns:
            Arrays by name, each [n, ...].

        Raises:
            DataError: a file is missing or damaged; the message names it.
        """
        ends = np.append(np.flatnonzero(np.diff(index) != 1) + 1, len(index))
        starts = np.append(0, ends[:-1])
        runs = list(zip(index[starts].tolist(), (index[ends - 1] + 1).tolist(), strict=True))
        pending = []
        for name, column in self.columns.items():  # every read begins before the first is awaited
            array, spans = self._arrays[split][name], [(a * column.width, b * column.width) for a, b in runs]
            pending.append((column, array, [(array.read(a, b), a, b) for a, b in spans]))
        out: dict[str, np.ndarray] = {}
        for column, array, reads in pending:
            pieces = [array.result(*read) for read in reads]
            out |= column.decode(np.concatenate(pieces).reshape(-1, column.width))
        return out

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads every file and compares its SHA-256 with the manifest.

        Args:
            progress: called with the number of files done, and of all.

        Raises:
            DataError: names the first file that differs.
        """
        files = files_of(self.location)
        listed = {k: v for split in self.manifest["splits"].values() for k, v in split["shards"].items()}
        for done, (name, expected) in enumerate(listed.items(), start=1):
            found = sha256_of(read_file(files, name))
            if found != expected:
                raise DataError(
                    f"{self.location}{name}: corrupt shard (sha256 {found}, manifest says {expected}); run the "
                    "same `slmjax data teacher` command again to write it anew"
                )
            progress(done, len(listed))


def arrays_of(location: str, columns: Mapping[str, Column], split: Split, shard: int) -> dict[str, Array]:
    """The array of each column. `shard`: tokens of one file."""
    return {name: Array(location, f"{split}/{name}", shard=shard * column.width) for name, column in columns.items()}


def sha256_of(raw: bytes | None) -> str:
    """Of the content of a file, which may be missing."""
    return "no such file" if raw is None else hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TeacherTargets(Extra):
    """Targets that `slmjax data teacher` has written, looked up for each token of a row.

    `Batch.extra` then holds `ids` and `log_probs`, both [B, T, n] (see `distill.offline.DistillOffline`), or `hidden`
    [B, T, D] (see `distill.source.OnDisk`).
    """

    folders: tuple[str, ...]
    """One for each token store that is read, in any order. Other targets make another experiment; another place of the
    same targets does not"""

    def __post_init__(self):
        if not self.folders:
            raise UserError("data.extra.folders is empty; name a folder that `slmjax data teacher` has written")

    @cached_property
    def opened(self) -> tuple[TargetStore, ...]:
        """The folders, all with the same columns.

        Raises:
            UserError: see `TargetStore`; or two of them are of different kinds or teachers.
        """
        stores = tuple(TargetStore(folder) for folder in self.folders)
        for name, other in zip(self.folders, stores, strict=True):
            for what in ("columns", "teacher", "tokenizer"):
                mine, first = (x.manifest[what] for x in (other, stores[0]))
                if what == "teacher":
                    mine, first = mine["hash"], first["hash"]
                if mine != first:
                    raise UserError(
                        f"data.extra.folders: {name} and {self.folders[0]} differ in {what}: {_brief(mine)} and "
                        f"{_brief(first)}; write both with the same teacher and options"
                    )
        return stores

    @property
    def by_store(self) -> dict[str, TargetStore]:
        """The fingerprint of a token store -> its targets."""
        return {targets.data: targets for targets in self.opened}

    @property
    def by_folder(self) -> dict[str, TargetStore]:
        """Each of `folders` -> its targets."""
        return dict(zip(self.folders, self.opened, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for processes that read ahead."""
        return {"folders": self.folders}

    def __call__(self, batch: Batch) -> Mapping[str, Any]:
        return self.located(batch, tuple)

    def located(self, batch: Batch, origins: Callable[[], Sequence[Origin]]) -> Mapping[str, Any]:
        out: dict[str, np.ndarray] = {}
        for column in self.opened[0].columns.values():
            for name, x in column.decode(np.zeros((1, column.width), column.stored)).items():
                out[name] = np.zeros((*batch.tokens.shape, *x.shape[1:]), x.dtype)
        found = origins()
        together: dict[tuple[str, Split], list[int]] = {}
        for i, origin in enumerate(found):
            together.setdefault((origin.store, origin.split), []).append(i)
        for (store, split), rows in together.items():
            index = np.stack([found[i].index for i in rows])
            real = index >= 0
            into = np.broadcast_to(np.array(rows)[:, None], index.shape)[real], np.nonzero(real)[1]
            for name, x in self.by_store[store].read(split, index[real]).items():
                out[name][into] = x
        return out

    def fits(self, stores: Sequence[TokenStore]) -> None:
        found = {data: targets.manifest for data, targets in self.by_store.items()}
        for store in stores:
            theirs = self.opened[0].manifest["tokenizer"]
            if theirs != store.tokenizer_fingerprint:
                raise UserError(
                    f"data.extra.folders: {self.folders[0]} has targets for text of the tokenizer {theirs[:12]}, and "
                    f"{store.name} has the tokenizer {store.tokenizer_fingerprint[:12]}; write targets for this data"
                )
            if store.fingerprint not in found:
                have = ", ".join(f"{m['data']['name']} ({data[:12]})" for data, m in found.items())
                raise UserError(
                    f"data.extra.folders: there are targets for {have}, and none for {store.name} "
                    f"({store.fingerprint[:12]}), which data reads; write them with `slmjax data teacher`"
                )

    def notes(self, length: int) -> tuple[str, ...]:
        windows = sorted({targets.manifest["length"] for targets in self.opened})
        if windows == [length]:
            return ()
        read = ", ".join(map(str, windows))
        return (f"the teacher read windows of {read} tokens, and rows have {length}: it saw other text before a token",)

    def identity(self) -> Any:
        return {"$type": "TeacherTargets", "targets": sorted(targets.fingerprint for targets in self.opened)}


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:80]
