"""`slmjax export MODEL --out DIR`: a Hugging Face folder, read back and compared before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse

HELP = "write a Hugging Face folder, reload it and compare the logits"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint or a Hugging Face folder"""
    out: str
    """The folder to write; it appears once every check has passed"""
    format: Literal["hf"] = "hf"
    """hf: config.json, safetensors, tokenizer files, model card"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the file; bfloat16 rounds them and halves the file"""
    overwrite: bool = False
    """Replace a folder that an earlier export wrote"""
    reference_python: str | None = None
    """A Python with torch and transformers, for the checks by stock transformers; default:
    $SLMJAX_REFERENCE_PYTHON, or this Python if it has them"""
    step: int | None = None
    """The checkpoint of a run to export; default: the latest"""
    name: str | None = None
    """The model's name on its card; default: the run's"""
    licence: str | None = None
    """The licence of the weights, an identifier of the Hugging Face hub such as apache-2.0; left open by default"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax export",
        description="Writes a model as stock transformers loads it, reads it back and compares the logits.",
        example="slmjax export runs/quickstart --format hf --out exports/quickstart --dtype bfloat16",
    )
    from slmjax.cli import facts
    from slmjax.cli.loading import load
    from slmjax.convert.card import Facts
    from slmjax.convert.export import export_hf
    from slmjax.convert.folder import check_free
    from slmjax.track.ledger import Ledger

    out = Path(args.out)
    check_free(out, overwrite=args.overwrite)
    loaded = load(args.model, step=args.step)
    if loaded.experiment is not None:
        name = args.name or loaded.experiment.name
        known = facts.collect(loaded.source, loaded.experiment, step=loaded.step or 0, name=name, licence=args.licence)
    else:
        parent = loaded.config.get("imported", {}).get("folder", loaded.source.name)
        known = Facts(name=args.name or out.name, licence=args.licence, parent=parent)
    exported = export_hf(
        loaded.decoder,
        loaded.params,
        out,
        dtype=args.dtype,
        tokenizer=loaded.tokenizer() if loaded.tokenizer_path else None,
        facts=known,
        overwrite=args.overwrite,
        reference_python=args.reference_python,
    )
    if exported.folded:
        print(f"folded into the weights, for no class of transformers has them: {', '.join(exported.folded)}")
    show(exported.checks)
    if loaded.experiment is not None:
        Ledger(loaded.source / "ledger.jsonl").append("exported", path=str(out), dtype=args.dtype, step=loaded.step)
    print(f"""exported to {out}
next:
  slmjax generate {out} --prompt "Once upon a time"
  python -c 'from transformers import AutoModelForCausalLM as M; print(M.from_pretrained("{out}"))'""")
    return 0


def show(checks: Sequence[Any]) -> None:
    """The gate's table on the terminal: `convert.gate.Check`s."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[check.passed]
        print(f"  {verdict} {check.name:{width}}  {check.found}  (expected {check.expected})")
