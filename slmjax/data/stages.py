"""The stages of `build` up to token ids, in order. Each writes files into the work folder and skips existing ones."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slmjax.data import dedup as dd
from slmjax.data.records import Report
from slmjax.data.token_store import SPLITS
from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.work import Context, run, save_arrays, write_bytes
from slmjax.errors import DataError
from slmjax.files import at


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The result of reading and cleaning."""

    count: int
    """Parts of cleaned text"""
    read: tuple[tuple[int, int], ...]
    """Documents and bytes read from each source"""
    reports: tuple[dict[str, Any], ...]
    """What else was found in each source (`records.Report.json`)"""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents are kept, and in which split."""

    split: np.ndarray
    """int8 [documents]: index into `SPLITS`, or -1 for a duplicate"""
    first: np.ndarray
    """int64 [parts + 1]: the number of the first document of each part"""
    dropped: dict[str, int]
    """Reason -> documents"""
    kept: list[int]
    """Kept documents of each source"""

    def of_part(self, index: int) -> np.ndarray:
        """`split` of the documents of one part."""
        return self.split[self.first[index] : self.first[index + 1]]


def clean(context: Context) -> Parts:
    """Read every source, clean each document, hash it, and keep the text in parts."""
    done = context.folder / "clean" / "done.json"
    if not done.is_file():
        (context.folder / "clean").mkdir(exist_ok=True)
        sources = context.recipe.sources
        read = [[0, 0] for _ in sources]
        reports = [Report() for _ in sources]
        count = 0

        def tasks() -> Iterator[tuple]:
            nonlocal count
            for texts, origin in _batches(context, read, reports):
                count += 1
                if not context.part("clean", count - 1).is_file():
                    yield context.quiet, count - 1, texts, origin

        for _ in run(context, _clean_part, tasks()):
            context.show("cleaning", sum(n for n, _ in read), None)
        found = {"count": count, "read": read, "reports": [report.json() for report in reports]}
        write_bytes(done, json.dumps(found).encode())
    counts = json.loads(done.read_text())
    context.show("cleaning", sum(n for n, _ in counts["read"]), sum(n for n, _ in counts["read"]))
    read_of = tuple((n, size) for n, size in counts["read"])
    return Parts(count=counts["count"], read=read_of, reports=tuple(counts["reports"]))


def _batches(context: Context, read: list[list[int]], reports: list[Report]) -> Iterator[tuple[list[str], list[int]]]:
    texts, origin, size = [], [], 0
    for index, source in enumerate(context.recipe.sources):
        for text in source.documents(at(context.recipe.root), reports[index]):
            length = len(text.encode("utf-8", "surrogatepass"))
            read[index][0] += 1
            read[index][1] += length
            texts.append(text)
            origin.append(index)
            size += length
            if size >= context.part_bytes:
                yield texts, origin
                texts, origin, size = [], [], 0
    if texts:
        yield texts, origin


def _clean_part(context: Context, index: int, texts: list[str], origin: list[int]) -> None:
    dedup, kept, sources = context.recipe.dedup, [], []
    dropped: collections.Counter[str] = collections.Counter()
    for text, source in zip(texts, origin, strict=True):
        text, reason = context.recipe.clean(text)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(text)
            sources.append(source)
    near = dedup is not None and dedup.near
    width = dedup.permutations if dedup and near else 0
    signatures = np.array([dd.signature(t, dedup) for t in kept] if dedup and near else [], np.uint32)
    signatures = signatures.reshape(len(kept), width)
    pq.write_table(
        pa.table({"text": pa.array(kept, pa.large_string())}),
        context.part("clean", index, "parquet"),
        compression="zstd",
    )
    save_arrays(
        context.part("clean", index),
        hash=np.array([dd.exact_hash(t) for t in kept], np.uint64).reshape(-1, 2),
        signature=signatures,
        keys=dd.band_keys(signatures, dedup) if dedup and near else np.zeros((len(kept), 0), np.uint64),
        source=np.array(sources, np.int32),
        dropped=np.array(json.dumps(dropped)),
    )


def select(context: Context, parts: Parts) -> Selection:
    """Find the duplicates over all parts and split the rest into train and validation by the hash of the text."""
    context.show("deduplicating", 0, 1)
    loaded: dict[str, list[np.ndarray]] = {"hash": [], "keys": [], "source": []}
    dropped: collections.Counter[str] = collections.Counter()
    signatures = context.folder / "signatures.bin"
    with open(signatures, "wb") as file:
        for index in range(parts.count):
            with np.load(context.part("clean", index)) as part:
                for name, arrays in loaded.items():
                    arrays.append(part[name])
                file.write(part["signature"].tobytes())
                dropped.update(json.loads(str(part["dropped"])))
    first = np.cumsum([0, *(len(h) for h in loaded["hash"])])
    read = sum(n for n, _ in parts.read)
    if first[-1] == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none read"
        raise DataError(f"recipe {context.recipe.name!r}: no document is left of {read} ({reasons}); check the sources")
    hashes = np.concatenate(loaded["hash"])
    removed = np.zeros(len(hashes), bool)
    if (dedup := context.recipe.dedup) is not None:
        removed = dd.exact_duplicates(hashes)
        dropped["exact duplicate"] = int(removed.sum())
        if dedup.near:
            mapped = np.memmap(signatures, np.uint32, "r").reshape(-1, dedup.permutations)
            near = dd.near_duplicates(mapped, np.concatenate(loaded["keys"]), removed, dedup)
            dropped["near duplicate"] = int(near.sum())
            removed |= near
    split = _split(hashes[:, 0], removed, context.recipe.validation)
    sources = np.concatenate(loaded["source"])[~removed]
    context.show("deduplicating", 1, 1)
    return Selection(
        split=split,
        first=first,
        dropped=dict(sorted(dropped.items())),
        kept=np.bincount(sources, minlength=len(parts.read)).tolist(),
    )


def _split(hashes: np.ndarray, removed: np.ndarray, fraction: float) -> np.ndarray:
    """Documents whose hash, as a fraction of 2^64, is below `fraction` are validation: at least one, and never all."""
    split = np.where(removed, -1, 0).astype(np.int8)
    left = np.flatnonzero(~removed)
    if fraction > 0 and len(left) > 1:
        ranked = left[np.argsort(hashes[left], kind="stable")]
        number = int((hashes[left] < np.uint64(min(fraction * 2**64, 2**64 - 2048))).sum())
        split[ranked[: min(max(number, 1), len(left) - 1)]] = 1
    return split


def make_tokenizer(context: Context, parts: Parts, selection: Selection) -> Tokenizer:
    """Train the tokenizer on the training split, or load it. It is always read back from the written files."""
    folder = context.folder / "tokenizer"
    if not folder.is_dir():
        context.show("tokenizer", 0, 1)
        total = sum(size for _, size in parts.read)
        step = max(1, -(-total // getattr(context.recipe.tokenizer, "sample_bytes", total or 1)))
        kept = (_texts(context, i, selection.of_part(i) == 0) for i in range(parts.count))
        texts = itertools.islice(itertools.chain.from_iterable(kept), 0, None, step)
        tokenizer = context.recipe.tokenizer.make(texts, at(context.recipe.root))
        building = context.folder / "tokenizer.tmp"
        tokenizer.save(building)
        os.rename(building, folder)
    context.show("tokenizer", 1, 1)
    return _tokenizer(folder)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    config = json.loads((folder / TOKENIZER_FILES[1]).read_text("utf-8"))
    begins = "" if config.get("add_bos_token") is False else config["bos_token"] or ""  # else only the template uses it
    return Tokenizer.load(folder, bos=begins, eos=config["eos_token"] or "")


def _texts(context: Context, index: int, keep: np.ndarray) -> list[str]:
    column = pq.read_table(context.part("clean", index, "parquet")).column("text")
    return column.filter(pa.array(keep)).to_pylist()


def tokenise(context: Context, parts: Parts, selection: Selection) -> None:
    """Token ids and lengths of every part."""
    (context.folder / "tokens").mkdir(exist_ok=True)
    _tokenizer.cache_clear()
    left = [i for i in range(parts.count) if not context.part("tokens", i).is_file()]
    done = parts.count - len(left)
    context.show("tokenising", done, parts.count)
    for _ in run(context, _tokenise_part, ((context.quiet, i, selection.of_part(i)) for i in left)):
        done += 1
        context.show("tokenising", done, parts.count)


def _tokenise_part(context: Context, index: int, split: np.ndarray) -> None:
    tokenizer, arrays = _tokenizer(context.folder / "tokenizer"), {}
    for number, name in enumerate(SPLITS):
        texts = _texts(context, index, split == number)
        tokens, lengths = tokenizer.documents(texts)
        arrays |= {f"{name}/tokens": tokens, f"{name}/lengths": lengths}
        arrays[f"{name}/bytes"] = np.array(sum(len(t.encode()) for t in texts), np.int64)
    save_arrays(context.part("tokens", index), **arrays)
