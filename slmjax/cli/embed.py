"""`slmjax embed MODEL --text ...`: vectors of texts, for search and comparison."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from slmjax.cli.args import parse, read_text, text_of
from slmjax.errors import StorageError, UserError

HELP = "vectors of texts: mean of the last layer, of norm 1"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text; give it several times for several"""
    text_file: str | None = None
    """A file with a text on each line; - is standard input"""
    out: str | None = None
    """A .npy file for the vectors, float32 [texts, width]; default: print them, a JSON list on each line"""
    length: int | None = None
    """Tokens that are read of a text; the rest is cut off; default: the model's context, at most 512"""
    batch: int = 32
    """Texts at a time"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""
    dtype: str = "float32"
    """float32 or bfloat16, of the computation"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax embed",
        description="Vectors of texts: the mean of the last layer over a text's tokens, divided by its norm, as "
        "sentence-transformers does.",
        example='slmjax embed runs/encoder --text "A sentence." --text "Another one."\n'
        "  slmjax embed models/all-MiniLM-L6-v2 --text-file lines.txt --out vectors.npy",
    )
    import numpy as np

    from slmjax.evals.embedding import embed
    from slmjax.runs.evaluating import compute_of
    from slmjax.runs.loading import load

    texts = _texts(args)
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; expected at least 1")
    if args.out is not None and not args.out.endswith(".npy"):
        raise UserError(f"--out is {args.out}; expected a file name that ends in .npy")
    loaded = load(args.model, step=args.step, say=_note)
    model = loaded.decoder.build(compute_of(args.dtype), loaded.numerics)
    length = args.length or min(model.context, 512)
    vectors = embed(model, loaded.weights, loaded.tokenizer(), texts, length=length, batch=args.batch)
    if args.out is None:
        for vector in vectors:
            print(json.dumps([round(float(x), 7) for x in vector]))
        return 0
    try:
        np.save(args.out, vectors)
    except OSError as error:
        raise StorageError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers, float32")
    return 0


def _texts(args: Args) -> list[str]:
    texts = [text_of("--text", text) for text in args.text]
    if args.text_file is not None:
        texts += [line for line in read_text("--text-file", args.text_file).splitlines() if line.strip()]
    if not texts:
        raise UserError('no text; add --text "..." or --text-file FILE')
    return texts


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
