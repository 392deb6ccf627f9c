"""`slmjax export MODEL --out PATH`: a Hugging Face folder or a GGUF file, read back and compared before it appears."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.files import at

HELP = "write a Hugging Face folder or a GGUF file, reload it and compare the logits"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    out: str
    """The folder (hf) or file (gguf) to write; it appears once every check has passed"""
    format: Literal["hf", "gguf"] = "hf"
    """hf: config.json, safetensors, tokenizer files, model card. gguf: one file that llama.cpp runs"""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """Dtype of the weights in the file; float16 and bfloat16 round them and halve the file. q8_0 (8 bits, a scale for
    each 32 weights) is for gguf. Quantized weights keep their codes; for hf this is the dtype of their scales"""
    overwrite: bool = False
    """Replace what an earlier export wrote"""
    reference_python: str | None = None
    """A Python with torch and transformers (for gguf: xllamacpp), for the checks by stock transformers (llama.cpp);
    default: $SLMJAX_REFERENCE_PYTHON, or this Python if it has them"""
    data: str | None = None
    """A token store: the stock runtime's loss is compared on about 1,000 tokens of its validation split; default: on a
    passage of text"""
    step: int | None = None
    """The checkpoint of a run to export; default: the latest"""
    name: str | None = None
    """The model's name on its card or in the file; default: the run's"""
    licence: str | None = None
    """The licence of the weights, an identifier of the Hugging Face hub such as apache-2.0; left open by default"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax export",
        description="Writes a model as stock transformers or llama.cpp load it, reads it back and compares.",
        example="slmjax export runs/quickstart --format hf --out exports/quickstart --dtype bfloat16\n"
        "  slmjax export runs/quickstart --format gguf --out exports/quickstart.gguf --dtype q8_0",
    )
    from slmjax.runs.exporting import FORMATS, Export
    from slmjax.runs.loading import load

    check, write = FORMATS[args.format]
    export = Export(
        out=at(args.out),
        dtype=args.dtype,
        overwrite=args.overwrite,
        reference_python=args.reference_python,
        name=args.name,
        licence=args.licence,
        data=args.data,
    )
    check(export)
    loaded = load(args.model, step=args.step)
    done = write(export, loaded, donate=True)
    if done.folded:
        print(f"folded into the weights, because the stock runtime has no such factors: {', '.join(done.folded)}")
    show(done.checks)
    print(f"exported to {args.out}\nnext:")
    for hint in {"hf": _after_hf, "gguf": _after_gguf}[args.format](loaded, args.out):
        print(f"  {hint}")
    return 0


def _after_hf(loaded: Any, out: str) -> tuple[str, ...]:
    from slmjax.convert.hf import family_of

    loader = family_of(loaded.decoder).stock(loaded.decoder).loader
    return (
        f"slmjax {loaded.decoder.example.format(shlex.quote(out))}",
        f"""python -c 'from transformers import {loader} as M; print(M.from_pretrained("{out}"))'""",
    )


def _after_gguf(loaded: Any, out: str) -> tuple[str, ...]:
    return (f'llama-cli -m {out} -p "Once upon a time"',)


def show(checks: Sequence[Any]) -> None:
    """The gate's table on the terminal: `convert.gate.Check`s."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[check.passed]
        print(f"  {verdict} {check.name:{width}}  {check.found}  (expected {check.expected})")
