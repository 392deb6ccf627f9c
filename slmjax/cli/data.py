"""`slmjax data build RECIPE --out DIR` and `slmjax data show DIR`; `slmjax data teacher` is in cli/data_teacher.py."""

# Annotations stay objects (no `from __future__`): tyro reads them.

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from slmjax.cli import tables
from slmjax.cli.args import parse
from slmjax.errors import UserError

if TYPE_CHECKING:
    from slmjax.data.rows import Rows
    from slmjax.data.token_store import TokenStore

HELP = "build a token store from text, show one, or write a teacher's predictions beside it"
BUILD_EXAMPLE = "slmjax data build data/recipes/english_classics.py --out runs/data/english_classics"
SHOW_EXAMPLE = "slmjax data show runs/data/english_classics --length 256 --samples 2"
TEACHER_EXAMPLE = "slmjax data teacher runs/teacher --data runs/data/english_classics --out runs/targets"
USAGE = f"""usage: slmjax data build RECIPE --out DIR
       slmjax data show DIR
       slmjax data teacher MODEL --data DIR --out DIR

build   sources, cleaning, deduplication, tokenizer, token store, manifest; resumes a build that was stopped
show    statistics of a store, and decoded samples with packing boundaries
teacher predictions of a trained model for every token of a store, which students learn from without it

Examples:
  {BUILD_EXAMPLE}
  {SHOW_EXAMPLE}
  {TEACHER_EXAMPLE}
`slmjax data build --help`, `slmjax data show --help` and `slmjax data teacher --help` list the fields."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """Arguments of `data build`."""

    recipe: tyro.conf.Positional[str]
    """A Python file with `def recipe() -> Recipe`"""
    out: str
    """Folder or URL (gs://, s3://) of the store; must be empty or not exist"""
    workers: int = 0
    """Processes; 0: one for each core"""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Arguments of `data show`."""

    store: tyro.conf.Positional[str]
    """Folder or URL of a store"""
    split: Literal["train", "validation"] = "train"
    length: int = 512
    """Tokens a sequence, as in `data.length`"""
    packing: Literal["best-fit", "concatenate"] = "best-fit"
    samples: int = 2
    """Sequences to decode"""
    seed: int = 0
    """Seed of the choice of sequences"""
    verify: bool = False
    """Read every shard and compare its SHA-256 with the manifest"""


def main(argv: list[str]) -> int:
    """Run `build`, `show` or `teacher`.

    Raises:
        UserError, DataError: one line that names the field or file.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    verb, *rest = argv
    if verb == "build":
        about = "Builds a token store from a recipe. Run the same command again to resume a build that was interrupted."
        return build(parse(Build, rest, prog="slmjax data build", description=about, example=BUILD_EXAMPLE))
    if verb == "show":
        about = "Shows what a token store holds, and sequences as training reads them."
        return show(parse(Show, rest, prog="slmjax data show", description=about, example=SHOW_EXAMPLE))
    if verb == "teacher":
        from slmjax.cli import data_teacher

        return data_teacher.main(rest)
    raise UserError(f"slmjax data: unknown {verb!r}; use `slmjax data build`, `data show` or `data teacher`")


def build(args: Build) -> int:
    """Build the store and print the next commands."""
    from slmjax.data.build import build as build_store
    from slmjax.data.recipe import load_recipe
    from slmjax.data.records import lines

    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}; expected 0 (one for each core) or more")
    from slmjax.data.build_progress import show_progress

    with show_progress() as progress:
        store = build_store(load_recipe(args.recipe), args.out, workers=args.workers or None, progress=progress)
    manifest = store.manifest
    documents, splits = manifest["documents"], manifest["splits"]
    dropped = ", ".join(f"{n:,} {why}" for why, n in documents["dropped"].items() if n)
    print(
        f"{args.out}: {documents['kept']:,} of {documents['read']:,} documents{dropped and f': {dropped}'}; "
        f"{manifest['tokens']:,} tokens "
        f"({splits['validation']['tokens']:,} for validation), vocabulary {store.vocab:,}"
    )
    for line in lines(manifest["sources"]):
        print(line)
    print(
        f"look at it:  slmjax data show {shlex.quote(args.out)}\n"
        f'use it:      PackedText(train=(Part(source="{args.out}"),))'
    )
    return 0


def show(args: Show) -> int:
    """Print statistics and samples."""
    import numpy as np
    from rich.console import Console

    from slmjax.data.build import cache_folder
    from slmjax.data.packing import BestFit, Concatenate
    from slmjax.data.records import lines
    from slmjax.data.rows import Rows
    from slmjax.data.spec import PackedText, Part
    from slmjax.data.token_store import TokenStore

    if args.samples < 0:
        raise UserError(f"--samples is {args.samples}; expected 0 or more sequences")
    packing = BestFit() if args.packing == "best-fit" else Concatenate()
    PackedText(train=(Part(source=args.store),), length=args.length, seed=args.seed)  # checks the length and the seed
    store = TokenStore(args.store)
    if args.verify:
        store.verify()
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    tabular = tables.console()
    for table in _tables(store):
        tables.show(table, tabular)
    rows = Rows(store, args.split, packing, args.length, cache_folder())
    for line in lines(store.manifest["sources"]):
        console.print(line, markup=False)
    filled = store.count(args.split, "tokens") / (rows.count * args.length)
    console.print(
        f"{args.split}, {args.packing}, length {args.length}: {rows.count:,} sequences, {1 - filled:.2%} padding"
    )
    # half of them at random, half with the most segments of a larger random draw: most rows of long documents have one
    drawn = np.random.default_rng(args.seed).choice(rows.count, min(32 * args.samples, rows.count), replace=False)
    drawn = drawn.tolist()
    at_random, others = drawn[: args.samples // 2], drawn[args.samples // 2 :]
    others.sort(key=lambda row: -len(rows.pieces(row)))
    for row in [*at_random, *others[: args.samples - len(at_random)]]:
        _print_row(console, store, rows, row)
    if args.verify:
        console.print("every shard has the SHA-256 that the manifest says")
    return 0


def _tables(store: "TokenStore") -> Iterator[Any]:
    from rich.table import Table

    manifest = store.manifest
    about = Table(title=store.name, show_header=False, title_justify="left")
    documents, tokenizer = manifest["documents"], manifest["tokenizer"]
    dropped = ", ".join(f"{n:,} {why}" for why, n in documents["dropped"].items() if n) or "none"
    for name, value in (
        ("location", store.location),
        ("fingerprint", store.fingerprint[:16]),
        ("tokenizer", f"{tokenizer['kind']}, vocabulary {tokenizer['vocab']:,}, {tokenizer['fingerprint'][:16]}"),
        ("BOS, EOS", f"{tokenizer['bos']} ({tokenizer['bos_id']}), {tokenizer['eos']} ({tokenizer['eos_id']})"),
        ("tokens", f"{manifest['tokens']:,} {manifest['dtype']}, {manifest['tokens_per_byte']:.3f} a byte"),
        ("documents", f"{documents['kept']:,} of {documents['read']:,} read; dropped: {dropped}"),
    ):
        about.add_row(name, value)
    yield about
    splits = Table(title="splits", title_justify="left")
    for column in ("", "documents", "tokens", "bytes", "tokens a document: median", "longest"):
        splits.add_column(column, justify="right" if column else "left")
    for name, split in manifest["splits"].items():
        median, longest = _lengths(store, name)
        counts = [f"{split[what]:,}" for what in ("documents", "tokens", "bytes")]
        splits.add_row(name, *counts, f"{median:,}", f"{longest:,}")
    yield splits
    sources = Table(title="sources", title_justify="left")
    for column in ("name", "licence", "files", "documents kept", "of", "bytes read"):
        sources.add_column(column, justify="left" if column in ("name", "licence") else "right")
    for s in manifest["sources"]:
        counts = (len(s["files"]), s["documents_kept"], s["documents_read"], s["bytes_read"])
        sources.add_row(s["name"], s["licence"], *(f"{n:,}" for n in counts))
    yield sources


def _lengths(store: "TokenStore", split: Any) -> tuple[int, int]:
    """Median (of the first 65,536 documents) and longest."""
    import numpy as np

    blocks = (np.diff(block) for block in store.offsets(split))
    first = next(blocks, None)
    if first is None:
        return 0, 0
    return int(np.median(first)), int(max([first.max(), *(b.max() for b in blocks)]))


def _print_row(console: Any, store: "TokenStore", rows: "Rows", row: int) -> None:
    """One sequence: each segment begins with ⟦its number⟧, in a colour of its own on a terminal."""
    import numpy as np
    from rich.text import Text

    from slmjax.data.rows import assemble

    batch = assemble([(rows, row)], rows.length)
    tokens, segments = np.asarray(batch.tokens[0]), np.asarray(batch.segment_ids[0])
    last, tokenizer = int(segments.max()), store.tokenizer()
    padding = int((segments == 0).sum())
    learned = int(batch.weights.sum())
    console.print(
        f"\nsequence {row:,}: {last} segments, {learned} targets, {padding} padding", style="bold", markup=False
    )
    for number in range(1, last + 1):
        style = ("cyan", "magenta", "green", "yellow", "blue")[number % 5]
        shown = tokenizer.decode(tokens[segments == number], special=True)
        console.print(Text.assemble((f"⟦{number}⟧ ", f"bold {style}"), (shown, style)))
    if padding:
        console.print(Text(f"⟦padding {padding}⟧", style="dim"))
