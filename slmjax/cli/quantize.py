"""`slmjax quantize MODEL --out DIR`: post-training quantization, with the loss before and after."""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.cli.held_out import HeldOutArgs, compared, opened_for
from slmjax.errors import UserError
from slmjax.files import at

HELP = "round the weights of a trained model to few bits (post-training quantization)"


@dataclass(frozen=True, kw_only=True)
class Args(HeldOutArgs):
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    out: str
    """The folder to write; every verb takes it as MODEL"""
    method: Literal["rtn", "rtn-mse", "gptq", "awq"] = "gptq"
    """rtn: to nearest, the scale from the largest weight. rtn-mse: the scale with the least squared error. gptq: later
    columns make up for the error of earlier ones, by the inputs seen on calibration data. awq: channels with
    large inputs are scaled up first, and large weights clipped"""
    bits: int = 4
    """Bits a weight of the layers' matrices, 2 to 8"""
    grid: Literal["symmetric", "asymmetric", "balanced", "mxfp4", "nvfp4"] = "symmetric"
    """symmetric: multiples of a scale. asymmetric: with a zero point. balanced, for 2 bits: +-1/2 and +-3/2 scales.
    mxfp4, nvfp4: floating point numbers of 4 bits, a scale of 8 bits for each 32 or 16 input channels"""
    group: int | None = None
    """Input channels that share a scale; default: all of an output channel"""
    embeddings: int | None = None
    """Bits of the embedding and output tables, each row with a scale; default: not rounded"""
    overwrite: bool = False
    """Replace what an earlier `slmjax quantize` wrote"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax quantize",
        description="Rounds the matrices of a model's layers to few bits and measures the loss before and after, on "
        "the same held-out data. Trained with rounding (experiments/quantize), a model loses less.",
        example="slmjax quantize runs/quickstart --bits 4 --out runs/quickstart-int4\n"
        "  slmjax quantize runs/quickstart --method rtn-mse --bits 2 --grid balanced --out runs/quickstart-int2",
    )
    from slmjax.convert.folder import check_free
    from slmjax.data.build_progress import show_progress
    from slmjax.runs.comparing import record
    from slmjax.runs.loading import load
    from slmjax.runs.quantizing import METHODS
    from slmjax.runs.quantizing_folder import rules_of, write

    method = METHODS[args.method]
    rules = rules_of(args.grid, args.bits, args.group, args.embeddings, args.method)
    check_free(at(args.out), overwrite=args.overwrite)
    loaded = load(args.model, step=args.step)
    if loaded.packed and not loaded.foreign:
        raise UserError(f"{args.model} is quantized already; quantize the model that it was made from")
    held_out = opened_for(args, loaded, reads_data=method.reads_data)
    with show_progress() as progress:
        batches = tuple(held_out.validation(args.batches)) if held_out is not None and method.reads_data else ()
        rounded = method(loaded.decoder, loaded.params, rules, batches, progress)
    done = write(at(args.out), loaded, rounded, about={"method": args.method, "grid": args.grid, "bits": args.bits},
                 overwrite=args.overwrite)  # fmt: skip
    _show(done)
    print(compared(args, held_out, loaded, lambda: load(args.out), keep=functools.partial(record, at(args.out))))
    out = shlex.quote(args.out)
    print(f"written to {args.out}\nnext:\n  slmjax export {out} --format gguf --out {out}.gguf\n  slmjax eval {out}")
    return 0


def _show(done: Any) -> None:
    print(
        f"{done.weights:,} of {done.parameters:,} parameters rounded to {done.bits:.2f} bits each, scales included; "
        f"{done.bytes:,} bytes, {8 * done.bytes / done.parameters:.2f} bits a parameter in all"
    )
    if done.tokens_a_parameter is not None:
        print(f"trained on {done.tokens_a_parameter:.1f} tokens a parameter: the more, the more rounding damages")
