"""Writes the targets of a teacher beside a token store, shard by shard; see data/teacher_targets.py for the folder.

A shard is a range of tokens, one file a column. It is computed by itself, a pure function of the settings and its
number, so shards may be divided over processes and hosts, and a run that follows a killed one computes what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slmjax import __version__
from slmjax.data.columns import Column
from slmjax.data.recipe import digest
from slmjax.data.teacher_targets import CHUNK_TOKENS, FORMAT, SETTINGS, VERSION, TargetStore, arrays_of, sha256_of
from slmjax.data.teacher_windows import Windows, windows
from slmjax.data.token_store import MANIFEST, SPLITS, Split, TokenStore, files_of, read_file, url_of
from slmjax.data.work import Progress, silent, write_bytes
from slmjax.distill.predicting import HALF, Predicting
from slmjax.distill.stored import BINS, LastHidden, Stored, calibration_error
from slmjax.errors import UserError
from slmjax.lock import hold
from slmjax.nn.compute import Compute
from slmjax.nn.numerics import Numerics
from slmjax.runs.folder import write_json
from slmjax.runs.loading import Loaded
from slmjax.runs.teacher_head import head_of, write_head
from slmjax.runs.teaching import check_vocabulary
from slmjax.serialise import differences, to_json
from slmjax.start import content_hash
from slmjax.types import Model

HEAD = "head"
SHARD_BYTES = 64 << 20
SAMPLE = 256
"""Tokens of each shard on which the errors of what is stored are measured"""
COMPRESSION = {
    "name": "blosc",
    "configuration": {"cname": "zstd", "clevel": 5, "shuffle": "shuffle", "typesize": 2, "blocksize": 0},
}


class Shard(NamedTuple):
    """Tokens [start, stop) of a split."""

    split: Split
    number: int
    start: int
    stop: int

    @property
    def mark(self) -> str:
        """The file that says that it is complete."""
        return f"done/{self.split}-{self.number:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is written, and how it is computed."""

    loaded: Loaded
    name: str
    """Of the teacher, for messages"""
    store: TokenStore
    out: Path
    stored: Stored
    length: int
    """Tokens of a window, the longest context of a prediction"""
    compute: Compute
    batch: int = 16
    """Rows of `length` tokens that are computed at once"""
    seed: int = 0
    shard: int | None = None
    """Tokens of a shard, a multiple of `CHUNK_TOKENS`; None: those of about `SHARD_BYTES`"""

    @cached_property
    def tokens(self) -> int:
        """Ids of the tokenizer, from 0."""
        return self.store.tokenizer().rows

    @property
    def has_head(self) -> bool:
        """Whether the folder holds the teacher's output table too."""
        return isinstance(self.stored, LastHidden)

    @cached_property
    def columns(self) -> dict[str, Column]:
        decoder = self.loaded.decoder
        return dict(self.stored.columns(self.tokens, getattr(decoder, "table_width", None) or decoder.width))

    @cached_property
    def model(self) -> Model:
        return self.loaded.decoder.build(self.compute, self.loaded.numerics)

    @cached_property
    def hash(self) -> str:
        return content_hash(jax.device_get(self.loaded.params))

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes a token before compression."""
        return sum(column.width * np.dtype(column.stored).itemsize for column in self.columns.values())

    @cached_property
    def shard_tokens(self) -> int:
        if self.shard is not None:
            return self.shard
        return max(1, min(SHARD_BYTES // self.raw_bytes, 1 << 17) // CHUNK_TOKENS) * CHUNK_TOKENS

    @property
    def shards(self) -> list[Shard]:
        counts: list[tuple[Split, int]] = [(split, self.store.count(split, "tokens")) for split in SPLITS]
        size = self.shard_tokens
        return [Shard(split, i, a, min(a + size, n)) for split, n in counts for i, a in enumerate(range(0, n, size))]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the bytes, as JSON."""
        return {
            "kind": to_json(self.stored),
            "columns": {name: to_json(column) for name, column in self.columns.items()},
            "data": {"name": self.store.name, "fingerprint": self.store.fingerprint},
            "tokenizer": self.store.tokenizer_fingerprint,
            "teacher": {"name": self.name, "hash": self.hash},
            "length": self.length,
            "batch": self.batch,
            "dtype": self.compute.dtype,
            "seed": self.seed,
            "shard": self.shard_tokens,
        }

    def check(self) -> None:
        """Checks everything that a user may get wrong, before anything is written.

        Raises:
            UserError: the model does not predict the tokens of this store, or an option is out of range.
        """
        decoder, most = self.loaded.decoder, self.loaded.decoder.context
        if not decoder.causal or decoder.labels:
            kind = f"scores the labels {', '.join(decoder.labels)}" if decoder.labels else "is an encoder"
            raise UserError(f"{self.name} {kind}; targets are predictions of the next token, by a decoder")
        if not 1 <= self.length <= most:
            raise UserError(f"--length is {self.length}; expected 1 to {most}, the context of {self.name}")
        if self.batch < 1:
            raise UserError(f"--batch is {self.batch}; expected at least 1")
        if self.shard is not None and (self.shard < 1 or self.shard % CHUNK_TOKENS):
            raise UserError(f"--shard is {self.shard}; expected a multiple of {CHUNK_TOKENS} tokens")
        if self.has_head and self.loaded.numerics != Numerics():
            raise UserError(f"{self.name} rounds its products, so its output table alone gives other logits; use top-k")
        check_vocabulary(self.name, self.loaded.tokenizer(), self.store.tokenizer(), field="")
        self.columns  # noqa: B018  raises if there are too few tokens


def write(writing: Writing, share: tuple[int, int] = (1, 1), progress: Progress = silent) -> TargetStore | None:
    """Computes the shards of this process that are not there, and completes the folder if it has all of them.

    Args:
        share: this process computes every n-th shard from the i-th, counted from 1: (i, n).

    Returns:
        The targets; None as long as other processes have not written theirs.

    Raises:
        UserError: something does not fit, or the folder holds other targets.
    """
    index, parts = share
    if not 1 <= index <= parts:
        raise UserError(f"--share is {index}/{parts}; expected I/N with I from 1 to N")
    writing.check()
    _claim(writing)
    advice = f"is writing this share of {writing.out}; wait for it, or choose another --share"
    with hold(writing.out / "done" / f"lock-{index}-of-{parts}", lambda owner: UserError(f"{owner} {advice}")):
        if index == 1 and writing.has_head and not (writing.out / HEAD).is_dir():
            write_head(writing.out / HEAD, writing.loaded, writing.model, writing.name)
        predicting = Predicting(model=writing.model, stored=writing.stored, tokens=writing.tokens)
        mine = writing.shards[index - 1 :: parts]
        done, total = 0, sum(shard.stop - shard.start for shard in mine)
        for shard in mine:
            if not _complete(writing.out, shard):
                _write_shard(writing, predicting, shard, lambda n, done=done: progress("tokens", done + n, total))
            done += shard.stop - shard.start
            progress("tokens", done, total)
    return _finish(writing)


def _claim(writing: Writing) -> None:
    """Makes the folder and says in it what it will hold, or checks what an earlier call said."""
    file, out = writing.out / SETTINGS, writing.out
    if file.is_file():
        try:
            begun = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); delete {out}, or choose another --out") from None
        name = {"teacher": {"name": writing.name}}  # the same teacher may lie elsewhere now
        settings = json.loads(json.dumps(writing.settings))
        changed = differences(begun | {"teacher": begun["teacher"] | name["teacher"]}, settings)
        if changed:
            raise UserError(
                f"{out} holds targets of other settings; they differ in {'; '.join(changed)}. Choose another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no targets of a teacher; choose another --out")
    (out / "done").mkdir(parents=True, exist_ok=True)
    write_json(file, writing.settings)


def _complete(out: Path, shard: Shard) -> bool:
    """Whether every file of a shard is as it was written."""
    found = _said(out, shard)
    return found is not None and all(
        sha256_of(read_file(files_of(out), name)) == expected for name, expected in found["shards"].items()
    )


def _said(out: Path, shard: Shard) -> dict[str, Any] | None:
    try:
        return json.loads((out / shard.mark).read_text())
    except (OSError, ValueError):
        return None


def _write_shard(writing: Writing, predicting: Predicting, shard: Shard, progress: Any) -> None:
    location, n = url_of(writing.out), shard.stop - shard.start
    found = {name: np.zeros((n, c.width), c.stored) for name, c in writing.columns.items()}
    key, params = jax.random.fold_in(jax.random.key(writing.seed), SPLITS.index(shard.split)), writing.loaded.params
    measured: dict[str, Any] = {}
    filled = 0
    for rows in _batches(writing, shard):
        batch = jax.tree.map(np.asarray, rows.batch)
        index = tuple(np.int32(np.maximum(x, 0)) for x in np.divmod(rows.index, HALF))
        values = jax.device_get(predicting.values(params, batch, index, key))
        at = np.nonzero((rows.index >= shard.start) & (rows.index < shard.stop))
        into = rows.index[at] - shard.start
        for name, column in writing.columns.items():
            found[name][into] = column.encode(values[name][at])
        if not measured:
            few = tuple(x[:SAMPLE] for x in at)
            read: dict[str, np.ndarray] = {}
            for name, column in writing.columns.items():
                read |= column.decode(found[name][into[:SAMPLE]])
            sums = jax.device_get(predicting.errors(params, batch, few, read))
            measured = {"tokens": len(few[0]), "kl": float(sums["kl"]), "moved": sums["moved"].tolist()}
        filled += len(into)
        progress(filled)
    files, hashes = files_of(location), {}
    for name, array in arrays_of(location, writing.columns, shard.split, writing.shard_tokens).items():
        column, total = writing.columns[name], writing.store.count(shard.split, "tokens")
        chunk = CHUNK_TOKENS * column.width
        target = array.create(total * column.width, column.stored, chunk=chunk, compression=COMPRESSION)
        target[shard.start * column.width : shard.stop * column.width].write(found[name].reshape(-1)).result()
        file = array.shard_name(shard.number)
        hashes[file] = sha256_of(read_file(files, file))
    size = sum((writing.out / file).stat().st_size for file in hashes)
    said = {"shards": hashes, "bytes": size, "measured": measured}
    write_bytes(writing.out / shard.mark, (json.dumps(said, indent=1) + "\n").encode())


def _batches(writing: Writing, shard: Shard) -> Iterator[Windows]:
    return windows(writing.store, shard.split, shard.start, shard.stop, length=writing.length, rows=writing.batch)


def _finish(writing: Writing) -> TargetStore | None:
    """Writes the manifest if every shard is there."""
    out = writing.out
    said = {shard: _said(out, shard) for shard in writing.shards}
    if any(x is None for x in said.values()) or (writing.has_head and not (out / HEAD).is_dir()):
        return None
    settings, head = writing.settings, None
    if writing.has_head:
        head = content_hash(jax.device_get(head_of(writing.loaded, writing.model)))
    splits: dict[str, Any] = {s: {"tokens": writing.store.count(s, "tokens"), "bytes": 0, "shards": {}} for s in SPLITS}
    tokens, kl, moved = 0, 0.0, np.zeros(BINS + 1)
    for shard, found in said.items():
        assert found is not None
        splits[shard.split]["shards"] |= found["shards"]
        splits[shard.split]["bytes"] += found["bytes"]
        tokens, kl = tokens + found["measured"]["tokens"], kl + found["measured"]["kl"]
        moved += np.array(found["measured"]["moved"])
    total = sum(split["tokens"] for split in splits.values())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": digest([settings, [split["shards"] for split in splits.values()]]),
        **settings,
        "teacher": {**settings["teacher"], "head": head},
        "bytes_per_token": sum(split["bytes"] for split in splits.values()) / max(total, 1),
        "uncompressed_bytes_per_token": writing.raw_bytes,
        "kl": kl / max(tokens, 1),
        "calibration_error": calibration_error(moved, tokens),
        "measured_on": tokens,
        "splits": splits,
        "slmjax": __version__,
    }
    write_bytes(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return TargetStore(str(out))
