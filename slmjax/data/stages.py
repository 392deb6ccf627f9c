"""The stages of `build`, in the order in which they run. Each leaves files in its folder and skips those it finds."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slmjax.data import dedup as dd
from slmjax.data.recipe import Recipe, describe, digest
from slmjax.data.token_store import FORMAT, MANIFEST, SPLITS, VERSION, Array, files_of, read_file
from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import DataError

PART_BYTES = 8 << 20  # text: seconds of work for one process, and small beside its memory


Progress: TypeAlias = Callable[[str, int, int | None], None]
"""(stage, done, total or None where it is not known yet)"""


def silent(stage: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage needs to know."""

    recipe: Recipe
    folder: Path
    workers: int
    show: Progress
    shard: int
    part_bytes: int

    @property
    def quiet(self) -> Context:
        """For a worker: what shows progress stays in this process."""
        return replace(self, show=silent)

    def part(self, stage: str, index: int, suffix: str = "npz") -> Path:
        """The file of one part."""
        return self.folder / stage / f"{index:06d}.{suffix}"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What reading and cleaning found."""

    count: int
    """Parts of cleaned text"""
    read: tuple[tuple[int, int], ...]
    """Documents and bytes read from each source"""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents stay, and where they go."""

    split: np.ndarray
    """int8 [documents]: index into `SPLITS`, or -1 for a duplicate"""
    first: np.ndarray
    """int64 [parts + 1]: the number of the first document of each part"""
    dropped: dict[str, int]
    """Reason -> documents"""
    kept: list[int]
    """Documents of each source that stay"""

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
        count = 0

        def tasks() -> Iterator[tuple]:
            nonlocal count
            for texts, origin in _batches(context, read):
                count += 1
                if not context.part("clean", count - 1).is_file():
                    yield context.quiet, count - 1, texts, origin

        for _ in _run(context, _clean_part, tasks()):
            context.show("cleaning", sum(n for n, _ in read), None)
        write_bytes(done, json.dumps({"count": count, "read": read}).encode())
    found = json.loads(done.read_text())
    context.show("cleaning", sum(n for n, _ in found["read"]), sum(n for n, _ in found["read"]))
    return Parts(count=found["count"], read=tuple((n, size) for n, size in found["read"]))


def _batches(context: Context, read: list[list[int]]) -> Iterator[tuple[list[str], list[int]]]:
    texts, origin, size = [], [], 0
    for index, source in enumerate(context.recipe.sources):
        for text in source.documents(Path(context.recipe.root)):
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
    _save(
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
    out = np.zeros(len(hashes), bool)
    if (dedup := context.recipe.dedup) is not None:
        out = dd.exact_duplicates(hashes)
        dropped["exact duplicate"] = int(out.sum())
        if dedup.near:
            mapped = np.memmap(signatures, np.uint32, "r").reshape(-1, dedup.permutations)
            near = dd.near_duplicates(mapped, np.concatenate(loaded["keys"]), out, dedup)
            dropped["near duplicate"] = int(near.sum())
            out |= near
    split = _split(hashes[:, 0], out, context.recipe.validation)
    sources = np.concatenate(loaded["source"])[~out]
    context.show("deduplicating", 1, 1)
    return Selection(
        split=split,
        first=first,
        dropped=dict(sorted(dropped.items())),
        kept=np.bincount(sources, minlength=len(parts.read)).tolist(),
    )


def _split(hashes: np.ndarray, out: np.ndarray, fraction: float) -> np.ndarray:
    """Documents whose hash, as a fraction of 2^64, is below `fraction` validate: at least one, and never all."""
    split = np.where(out, -1, 0).astype(np.int8)
    left = np.flatnonzero(~out)
    if fraction > 0 and len(left) > 1:
        ranked = left[np.argsort(hashes[left], kind="stable")]
        number = int((hashes[left] < np.uint64(min(fraction * 2**64, 2**64 - 2048))).sum())
        split[ranked[: min(max(number, 1), len(left) - 1)]] = 1
    return split


def make_tokenizer(context: Context, parts: Parts, selection: Selection) -> Tokenizer:
    """Train the tokenizer on the training split, or load it. What is used is what was written."""
    folder = context.folder / "tokenizer"
    if not folder.is_dir():
        context.show("tokenizer", 0, 1)
        total = sum(size for _, size in parts.read)
        step = max(1, -(-total // getattr(context.recipe.tokenizer, "sample_bytes", total or 1)))
        kept = (_texts(context, i, selection.of_part(i) == 0) for i in range(parts.count))
        texts = itertools.islice(itertools.chain.from_iterable(kept), 0, None, step)
        tokenizer = context.recipe.tokenizer.make(texts, Path(context.recipe.root))
        building = context.folder / "tokenizer.tmp"
        tokenizer.save(building)
        os.rename(building, folder)
    context.show("tokenizer", 1, 1)
    return _tokenizer(folder)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    config = json.loads((folder / TOKENIZER_FILES[1]).read_text("utf-8"))
    return Tokenizer.load(folder, bos=config["bos_token"] or "", eos=config["eos_token"] or "")


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
    for _ in _run(context, _tokenise_part, ((context.quiet, i, selection.of_part(i)) for i in left)):
        done += 1
        context.show("tokenising", done, parts.count)


def _tokenise_part(context: Context, index: int, split: np.ndarray) -> None:
    tokenizer, arrays = _tokenizer(context.folder / "tokenizer"), {}
    for number, name in enumerate(SPLITS):
        texts = _texts(context, index, split == number)
        tokens, lengths = tokenizer.documents(texts)
        arrays |= {f"{name}/tokens": tokens, f"{name}/lengths": lengths}
        arrays[f"{name}/bytes"] = np.array(sum(len(t.encode()) for t in texts), np.int64)
    _save(context.part("tokens", index), **arrays)


def write(context: Context, parts: Parts, location: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the arrays of both splits, shard by shard -> the manifest's account of each split."""
    (context.folder / "written").mkdir(exist_ok=True)
    account = {}
    for name in SPLITS:
        lengths, size = [np.zeros(1, np.int64)], 0
        ends = [0]
        for index in range(parts.count):
            with np.load(context.part("tokens", index)) as part:
                lengths.append(part[f"{name}/lengths"])
                size += int(part[f"{name}/bytes"])
            ends.append(ends[-1] + int(lengths[-1].sum()))
        offsets = np.cumsum(np.concatenate(lengths))
        shards: dict[str, str] = {}
        if ends[-1]:
            tokens = functools.partial(_tokens_between, context, name, np.array(ends))
            shards |= _write_array(
                context, Array(location, f"{name}/tokens", shard=context.shard), ends[-1], tokenizer.dtype, tokens
            )
            between = lambda a, b, offsets=offsets: offsets[a:b]  # noqa: E731
            shards |= _write_array(
                context, Array(location, f"{name}/offsets", shard=context.shard), len(offsets), np.int64, between
            )
        account[name] = {"documents": len(offsets) - 1, "tokens": ends[-1], "bytes": size, "shards": shards}
    return account


def _tokens_between(context: Context, split: str, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    pieces = []
    for index in range(np.searchsorted(ends, start, "right") - 1, np.searchsorted(ends, stop, "left")):
        with np.load(context.part("tokens", index)) as part:
            at = int(ends[index])
            pieces.append(part[f"{split}/tokens"][max(0, start - at) : stop - at])
    return np.concatenate(pieces)


def _write_array(context: Context, array: Array, size: int, dtype: Any, values: Callable) -> dict[str, str]:
    """Write what is missing; a shard appears whole or not at all. Returns the SHA-256 of every file."""
    target, files = array.create(size, dtype), files_of(array.location)
    hashes = {}
    for shard in range(array.shards()):
        mark = context.folder / "written" / f"{array.name.replace('/', '-')}-{shard}"
        if not mark.is_file():
            start, stop = shard * array.shard, min(size, (shard + 1) * array.shard)
            target[start:stop].write(values(start, stop)).result()
            mark.touch()
        context.show(f"writing {array.name}", shard + 1, array.shards())
        hashes[array.shard_name(shard)] = _sha256(read_file(files, array.shard_name(shard)) or b"")
    hashes[f"{array.name}/zarr.json"] = _sha256(read_file(files, f"{array.name}/zarr.json") or b"")
    return hashes


def write_manifest(
    context: Context,
    parts: Parts,
    selection: Selection,
    tokenizer: Tokenizer,
    location: str,
    splits: dict[str, Any],
    build: dict[str, Any],
) -> None:
    """The tokenizer's files, and last the manifest: from here on the store exists."""
    files = files_of(location)
    for name in TOKENIZER_FILES:
        files.write(name, (context.folder / "tokenizer" / name).read_bytes()).result()
    tokens, size = (sum(s[what] for s in splits.values()) for what in ("tokens", "bytes"))
    sources = [
        {"name": s.title, "licence": s.licence, "origin": s.origin, "files": found}
        | {"documents_read": n, "bytes_read": b, "documents_kept": kept}
        for s, found, (n, b), kept in zip(
            context.recipe.sources, build["files"], parts.read, selection.kept, strict=True
        )
    ]
    known = {
        "kind": type(context.recipe.tokenizer).__name__,
        "vocab": tokenizer.vocab,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "fingerprint": tokenizer.fingerprint,
    }
    dtype = np.dtype(tokenizer.dtype).name
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": context.recipe.name,
        "fingerprint": digest([known["fingerprint"], dtype, [s["shards"] for s in splits.values()]]),
        "tokenizer": known,
        "dtype": dtype,
        "shard": context.shard,
        "documents": {"read": sum(n for n, _ in parts.read), "kept": sum(selection.kept), "dropped": selection.dropped},
        "bytes": size,
        "tokens": tokens,
        "tokens_per_byte": tokens / size,
        "splits": splits,
        "sources": sources,
        "recipe": describe(context.recipe),
        "build": {"digest": build["digest"], "slmjax": build["version"]},
    }
    files.write(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()).result()


def describe_files(groups: list[list[Path]], root: Path, show: Progress) -> list[list[dict[str, Any]]]:
    """Path relative to the recipe, size and SHA-256 of each file of each source."""
    total, done, out = sum(map(len, groups)), 0, []
    for group in groups:
        out.append([])
        for path in group:
            with open(path, "rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            out[-1].append({"path": os.path.relpath(path, root), "bytes": path.stat().st_size, "sha256": sha})
            done += 1
            show("checking files", done, total)
    return out


def write_bytes(path: Path, content: bytes) -> None:
    """The file appears whole or not at all."""
    building = path.with_name(path.name + ".tmp")
    building.write_bytes(content)
    os.replace(building, path)


def _save(path: Path, **arrays: np.ndarray) -> None:
    building = path.with_name(path.name + ".tmp")
    with open(building, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(building, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _run(context: Context, function: Callable, tasks: Iterable[tuple]) -> Iterator[Any]:
    """Results in the order of the tasks: in this process if there is one task or one worker, else in several."""
    tasks = iter(tasks)
    head = list(itertools.islice(tasks, 2))
    if context.workers == 1 or len(head) < 2:
        yield from (function(*task) for task in itertools.chain(head, tasks))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads of jax and TensorStore half
    with concurrent.futures.ProcessPoolExecutor(context.workers, spawn, _begin_worker) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for task in itertools.chain(head, tasks):
                waiting.append(pool.submit(function, *task))
                if len(waiting) > 2 * context.workers:  # what has been read ahead stays bounded
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
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
