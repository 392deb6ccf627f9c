"""`slmjax import MODEL --out DIR`: a Hugging Face folder or a GGUF file into a folder of slmjax."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

HELP = "read a Hugging Face folder or a GGUF file"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder with config.json and safetensors, or a .gguf file; nothing in it is run"""
    out: str
    """The folder to write: config.json, the weights, tokenizer.json"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax import",
        description="Reads a model that transformers saved or llama.cpp runs into a folder that every verb takes as "
        "MODEL. Weights that are a scale times an integer stay packed; others become float32.",
        example="slmjax import exports/quickstart --out runs/imported\n"
        "  slmjax import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2",
    )
    from slmjax import __version__
    from slmjax.compress.quant.into_memory import packed_in
    from slmjax.convert.folder import publish
    from slmjax.convert.memory import to_device
    from slmjax.models.flops import parameter_count
    from slmjax.runs import packed_folder
    from slmjax.runs.folder import write_json
    from slmjax.runs.loading import fitting
    from slmjax.runs.quantizing import bits_a_weight
    from slmjax.serialise import to_json
    from slmjax.train.checkpoint_folder import save_params

    source = at(args.model)
    with publish(at(args.out), overwrite=None) as folder:
        imported, tokenizer, generation, about = (_gguf if source.is_file() or source.suffix == ".gguf" else _hf)(
            source
        )
        if tokenizer is not None:
            fitting(tokenizer, imported.decoder.vocab, source)
        described = {"folder": source.name, "model_type": imported.family.model_type, **about}
        generation.save(folder)
        if packed := packed_in(imported.params):
            facts = {"slmjax": __version__, "imported": described, **generation.ids}
            packed_folder.write(folder, imported.decoder, imported.params, packed, facts)
        else:
            whole = {"format": 1, "slmjax": __version__, "model": to_json(imported.decoder), "imported": described}
            whole |= generation.ids
            write_json(folder / "config.json", whole)
            save_params(folder / "checkpoints", to_device(imported.params), described)
        if tokenizer is not None:
            tokenizer.save(folder)
    print(f"{imported.family.name} of {parameter_count(imported.decoder):,} parameters imported to {args.out}")
    if packed:
        weights = sum(math.prod(p.blocks.shape) for p in packed.values())
        print(f"{weights:,} of them stay packed, {bits_a_weight(packed):.2f} bits each, scales included")
    example = imported.decoder.example
    if tokenizer is not None and tokenizer.chat:
        example = "generate {} --chat 'What is gravity?'"
    out = shlex.quote(args.out)
    print(f"next:\n  slmjax inspect {out}\n  slmjax {example.format(out)}")
    return 0


def _hf(source: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model, its tokenizer or None, its `GenerationConfig`, and further facts for config.json."""
    from slmjax.convert.hf import import_hf
    from slmjax.data import generation_config
    from slmjax.data.tokenizer import Tokenizer

    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected one with config.json and model.safetensors")
    if (source / "checkpoints").is_dir():
        raise UserError(f"{source} is a folder of slmjax already: every verb takes it as MODEL")
    imported = import_hf(source, packed=True)
    tokenizer = imported.tokenizer_path and Tokenizer.load(imported.tokenizer_path)
    return imported, tokenizer, generation_config.read(source, imported.config), {}


def _gguf(source: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    from slmjax.convert.gguf.load import import_gguf

    imported = import_gguf(source, packed=True)
    about = {} if imported.licence is None else {"licence": imported.licence}
    return imported, imported.tokenizer, imported.generation, about
