"""Speed of tokenising against the bare `tokenizers` library, of the loader against a training step, of deduplication.

    python benchmarks/data.py

Prints each figure with its comparison and its threshold, and exits with 1 if a bar is missed. All cores this process
may use; text from data/english_classics, repeated where more is needed. About three minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as Bare

from slmjax.data import stages
from slmjax.data.build import build
from slmjax.data.cleaning import Clean
from slmjax.data.dedup import Dedup
from slmjax.data.loader import Loader
from slmjax.data.recipe import Recipe, load_recipe
from slmjax.data.sources import JSONL
from slmjax.data.spec import PackedText, Part
from slmjax.data.token_store import SHARD, TokenStore
from slmjax.data.tokenizer import File
from slmjax.data.work import PART_BYTES, Context, silent

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
STEP_B = 7526
"""Tokens/s that the training step of config B (width 256, 4 layers, sequence 256, batch 16) consumes on two cores"""
LENGTH, BATCH = 256, 16
ROUNDS = 3


def main() -> int:
    """Run all and print one table."""
    table = Table("what", "slmjax", "compared to", "ratio", "bar", "")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["SLMJAX_CACHE"] = str(work / "cache")
        store = build(load_recipe(ROOT / "data/recipes/english_classics.py"), work / "small")
        texts = documents()
        for row in (*tokenising(work, store, texts), *loading(work, store, texts), *deduplication(work, texts)):
            *cells, held = row
            missed += not held
            table.add_row(*cells, "[green]held[/]" if held else "[red]missed[/]")
    Console(width=None if sys.stdout.isatty() else 140).print(f"{CORES} cores", table)
    return int(missed > 0)


def documents() -> list[str]:
    """The embedded corpus, clean, so that both sides of a comparison tokenise the same text."""
    recipe = load_recipe(ROOT / "data/recipes/english_classics.py")
    return [Clean()(t)[0] for source in recipe.sources for t in source.documents(Path(recipe.root))]


def write(path: Path, texts: list[str]) -> Path:
    """One JSONL file."""
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


def context_of(work: Path, recipe: Recipe) -> Context:
    """A build's context, to run single stages."""
    work.mkdir()
    return Context(recipe=recipe, folder=work, workers=CORES, show=silent, shard=SHARD, part_bytes=PART_BYTES)


def tokenising(work: Path, store: TokenStore, texts: list[str]):
    """The tokenise stage of a build (reading parts, ids, files; processes already counted) against `encode_batch`."""
    texts = texts * 4
    size = sum(len(t.encode()) for t in texts)
    recipe = Recipe(
        name="tokenising",
        sources=(JSONL(path=str(write(work / "t.jsonl", texts)), licence="public domain"),),
        dedup=None,
        tokenizer=File(path=str(store.tokenizer_path)),
    )
    context = context_of(work / "tokenising", recipe)
    parts = stages.clean(context)
    selection = stages.select(context, parts)
    stages.make_tokenizer(context, parts, selection)
    bare = Bare.from_file(str(store.tokenizer_path / "tokenizer.json"))
    ours, theirs = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        encoded = [np.array(e.ids, np.uint16) for e in bare.encode_batch(texts, add_special_tokens=False)]
        theirs.append(size / 1e6 / (time.perf_counter() - begin))
        tokens = sum(map(len, encoded)) + 2 * len(texts)
        begin = time.perf_counter()
        stages.tokenise(context, parts, selection)
        ours.append(size / 1e6 / (time.perf_counter() - begin))
        written = list((context.folder / "tokens").iterdir())
        counted = sum(int(np.load(p)[f"{s}/lengths"].sum()) for p in written for s in ("train", "validation"))
        if counted != tokens:
            raise SystemExit(f"{counted} tokens written, the library says {tokens}")
        for path in written:
            path.unlink()
    a, b = statistics.median(ours), statistics.median(theirs)
    yield "tokenising", f"{a:.2f} MB/s", f"{b:.2f} MB/s tokenizers.encode_batch", f"{a / b:.2f}", "0.9", a / b >= 0.9


def loading(work: Path, store: TokenStore, texts: list[str]):
    """The loader alone, from shuffled random access; and its memory for a corpus ten times the size."""
    recipe = Recipe(
        name="large",
        sources=(JSONL(path=str(write(work / "l.jsonl", texts * 10)), licence="public domain"),),
        dedup=None,
        tokenizer=File(path=str(store.tokenizer_path)),
    )
    large = build(recipe, work / "large")
    figures = [measured(s) for s in (store, large)]
    for (speed, _), s in zip(figures, (store, large), strict=True):
        what, ratio = f"loader, {s.manifest['tokens'] / 1e6:.0f}M tokens", speed / STEP_B
        yield what, f"{speed:,.0f} tok/s", f"{STEP_B:,} tok/s step of config B", f"{ratio:.0f}", "20", ratio >= 20
    small_memory, large_memory = figures[0][1], figures[1][1]
    grown = large_memory - small_memory
    shown = f"{large_memory:.0f} MiB at 10x", f"{small_memory:.0f} MiB at 1x"
    yield "loader's memory", *shown, f"{grown:+.0f} MiB", "16 MiB", grown <= 16


def measured(store: TokenStore) -> tuple[float, float]:
    """Tokens/s, and growth of the resident memory in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--loader", store.location]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    speed, memory = json.loads(answer.splitlines()[-1])
    return speed, memory


def loader_alone(location: str) -> None:
    """The program that `measured` runs in a process of its own."""
    import grain  # noqa: F401  its own size is not the loader's
    import psutil

    process = psutil.Process()
    store = TokenStore(location)
    before = process.memory_info().rss
    loader = Loader(PackedText(train=(Part(source=location),), length=LENGTH, batch=BATCH), [store])
    for _ in range(50):
        next(loader)
    begin, batches = time.perf_counter(), 2000
    for _ in range(batches):
        next(loader)
    speed = batches * BATCH * LENGTH / (time.perf_counter() - begin)
    print(json.dumps([speed, (process.memory_info().rss - before) / 2**20]))


def deduplication(work: Path, texts: list[str]):
    """Cleaning, signatures, exact and near duplicates of 30 MB: two of three documents are changed copies."""
    rng = random.Random(0)
    pieces = [p for t in texts for p in cut(t, 3000)]
    copies = [changed(p, rng) for p in pieces for _ in range(2)]
    path = write(work / "d.jsonl", pieces + copies)
    recipe = Recipe(name="dedup", sources=(JSONL(path=str(path), licence="public domain"),), dedup=Dedup(threshold=0.8))
    context = context_of(work / "dedup", recipe)
    begin = time.perf_counter()
    parts = stages.clean(context)
    selection = stages.select(context, parts)
    seconds = time.perf_counter() - begin
    size = parts.read[0][1] / 1e6
    removed = sum(selection.dropped.values())
    what = f"deduplication, {size:.0f} MB, {len(pieces) * 3:,} documents"
    yield what, f"{seconds:.1f} s", f"{removed:,} removed of {len(copies):,} copies", "", "60 s", seconds < 60


def cut(text: str, size: int) -> list[str]:
    """Paragraphs joined to pieces of about `size` characters."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) > size:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return pieces


def changed(text: str, rng: random.Random) -> str:
    """A copy with one word in a hundred replaced."""
    return " ".join("changed" if rng.random() < 0.01 else w for w in text.split(" "))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loader"]:
        loader_alone(sys.argv[2])
    else:
        sys.exit(main())
