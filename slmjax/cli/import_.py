"""`slmjax import DIR --out DIR`: a Hugging Face folder as a model of ours, to evaluate, sample or train on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError

HELP = "read a Hugging Face folder"


@dataclass(frozen=True)
class Args:
    folder: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder with config.json and safetensors; nothing in it is run"""
    out: str
    """The folder to write: config.json, checkpoints/0, tokenizer.json"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax import",
        description="Reads a model that transformers saved into a folder that every verb takes as MODEL.",
        example="slmjax import exports/quickstart --out runs/imported",
    )
    from slmjax import __version__
    from slmjax.cli.runs import write_json
    from slmjax.convert.folder import publish
    from slmjax.convert.hf import import_hf
    from slmjax.data.tokenizer import Tokenizer
    from slmjax.models.flops import parameter_count
    from slmjax.serialise import to_json
    from slmjax.train.checkpoint import save_params

    source = Path(args.folder)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected one with config.json and model.safetensors")
    with publish(Path(args.out), overwrite=None) as folder:
        imported = import_hf(source)
        described = {
            "format": 1,
            "slmjax": __version__,
            "model": to_json(imported.decoder),
            "imported": {"folder": source.name, "model_type": imported.family.model_type},
        }
        write_json(folder / "config.json", described)
        save_params(folder / "checkpoints", imported.params, described["imported"])
        if imported.tokenizer_path is not None:
            Tokenizer.load(imported.tokenizer_path).save(folder)
    print(f"{imported.family.name} of {parameter_count(imported.decoder):,} parameters imported to {args.out}")
    print(f"next:\n  slmjax inspect {args.out}\n  slmjax generate {args.out} --prompt 'Once upon a time'")
    return 0
