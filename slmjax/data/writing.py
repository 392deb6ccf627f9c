"""The last stage of `build`: arrays, then the manifest, with the SHA-256 of every file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.data.recipe import digest
from slmjax.data.stages import Parts, Selection
from slmjax.data.token_store import FORMAT, MANIFEST, SPLITS, VERSION, Array, files_of, read_file
from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.work import Context, Progress


def write(context: Context, parts: Parts, location: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the arrays of both splits, shard by shard -> what the manifest says of each split."""
    (context.folder / "written").mkdir(exist_ok=True)
    splits = {}
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
        splits[name] = {"documents": len(offsets) - 1, "tokens": ends[-1], "bytes": size, "shards": shards}
    return splits


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
    """The tokenizer's files, and last the manifest, which makes the store complete."""
    files = files_of(location)
    for name in TOKENIZER_FILES:
        files.write(name, (context.folder / "tokenizer" / name).read_bytes()).result()
    tokens, size = (sum(s[what] for s in splits.values()) for what in ("tokens", "bytes"))
    sources = [
        {"name": s.title, "licence": s.licence, "origin": s.origin, "files": used}
        | {"documents_read": n, "bytes_read": b, "documents_kept": kept, **found}
        for s, used, (n, b), kept, found in zip(
            context.recipe.sources, build["files"], parts.read, selection.kept, parts.reports, strict=True
        )
    ]
    about_tokenizer = {
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
        "fingerprint": digest([about_tokenizer["fingerprint"], dtype, [s["shards"] for s in splits.values()]]),
        "tokenizer": about_tokenizer,
        "dtype": dtype,
        "shard": context.shard,
        "documents": {"read": sum(n for n, _ in parts.read), "kept": sum(selection.kept), "dropped": selection.dropped},
        "bytes": size,
        "tokens": tokens,
        "tokens_per_byte": tokens / size,
        "splits": splits,
        "sources": sources,
        "recipe": context.recipe.identity(),
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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
