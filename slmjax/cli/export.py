"""`slmjax export MODEL --out PATH`: a Hugging Face folder or a GGUF file, read back and compared before it appears."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError

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
    """Of the weights in the file; bfloat16 rounds them and halves the file. float16 and q8_0 (8 bits, a scale for each
    32 weights) are for gguf"""
    overwrite: bool = False
    """Replace what an earlier export wrote"""
    reference_python: str | None = None
    """A Python with torch and transformers (for gguf: xllamacpp), for the checks by stock transformers (llama.cpp);
    default: $SLMJAX_REFERENCE_PYTHON, or this Python if it has them"""
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
    from slmjax.convert.card import Facts
    from slmjax.convert.folder import check_free
    from slmjax.convert.gguf.export import check_file_free
    from slmjax.runs import facts
    from slmjax.runs.loading import load
    from slmjax.track.ledger import Ledger

    out = Path(args.out)
    write = {"hf": _hf, "gguf": _gguf}[args.format]
    if args.format == "hf":
        if args.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {args.dtype} is for --format gguf; a Hugging Face folder: float32, bfloat16")
        check_free(out, overwrite=args.overwrite)
    else:
        check_file_free(out, overwrite=args.overwrite)
    loaded = load(args.model, step=args.step)
    if loaded.experiment is not None:
        name = args.name or loaded.experiment.name
        known = facts.collect(loaded.source, loaded.experiment, step=loaded.step or 0, name=name, licence=args.licence)
    else:
        imported = loaded.config.get("imported", {})
        known = Facts(
            name=args.name or out.stem,
            licence=args.licence or imported.get("licence"),
            parent=imported.get("folder", loaded.source.name),
        )
    checks, hints = write(args, out, loaded, known)
    show(checks)
    if loaded.experiment is not None:
        Ledger(loaded.source / "ledger.jsonl").append("exported", path=str(out), dtype=args.dtype, step=loaded.step)
    print(f"exported to {out}\nnext:")
    for hint in hints:
        print(f"  {hint}")
    return 0


def _hf(args: Args, out: Path, loaded: Any, known: Any) -> tuple[Sequence[Any], Sequence[str]]:
    from slmjax.convert.export import export_hf
    from slmjax.convert.hf import family_of

    exported = export_hf(
        loaded.decoder,
        loaded.params,
        out,
        dtype=args.dtype,
        numerics=loaded.numerics,
        tokenizer=loaded.tokenizer() if loaded.has_tokenizer else None,
        facts=known,
        overwrite=args.overwrite,
        reference_python=args.reference_python,
        donate=True,
    )
    loader = family_of(loaded.decoder).asked(loaded.decoder).loader
    if exported.folded:
        print(f"folded into the weights, for no class of transformers has them: {', '.join(exported.folded)}")
    return exported.checks, (
        f"slmjax {loaded.decoder.example.format(shlex.quote(str(out)))}",
        f"""python -c 'from transformers import {loader} as M; print(M.from_pretrained("{out}"))'""",
    )


def _gguf(args: Args, out: Path, loaded: Any, known: Any) -> tuple[Sequence[Any], Sequence[str]]:
    from slmjax.convert.gguf.export import export_gguf

    exported = export_gguf(
        loaded.decoder,
        loaded.params,
        out,
        dtype=args.dtype,
        numerics=loaded.numerics,
        tokenizer=loaded.tokenizer(),
        facts=known,
        overwrite=args.overwrite,
        reference_python=args.reference_python,
        donate=True,
    )
    if exported.folded:
        print(f"folded into the weights, for llama.cpp has no such factors: {', '.join(exported.folded)}")
    return exported.checks, (f'llama-cli -m {out} -p "Once upon a time"',)


def show(checks: Sequence[Any]) -> None:
    """The gate's table on the terminal: `convert.gate.Check`s."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[check.passed]
        print(f"  {verdict} {check.name:{width}}  {check.found}  (expected {check.expected})")
