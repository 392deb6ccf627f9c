"""`slmjax prune MODEL --out DIR`: zeros in the weights, or fewer layers or channels, with the loss before and after."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.cli.held_out import HeldOutArgs, compared, opened_for
from slmjax.errors import UserError
from slmjax.files import at

HELP = "remove weights, layers or channels of a trained model"


@dataclass(frozen=True, kw_only=True)
class Args(HeldOutArgs):
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    out: str
    """The folder to write; every verb takes it as MODEL"""
    method: Literal["magnitude", "wanda", "sparsegpt", "depth", "width"] = "sparsegpt"
    """magnitude, wanda, sparsegpt: zeros in the matrices of the layers, which makes nothing faster. depth: fewer
    layers. width: fewer channels or heads in every layer, as `width` says"""
    width: Literal["ff", "heads", "model"] = "ff"
    """What `--method width` removes. ff: hidden channels of feed-forward layers. heads: query heads with the keys and
    values that they share. model: channels of the residual stream (d_model). Of heads and model, the number left is
    the nearest with which stock transformers can load the model"""
    sparsity: float | None = None
    """Share of the weights, layers, channels or heads that is removed; default: 0.5, or as `pattern` says"""
    pattern: str | None = None
    """N:M: of each M consecutive input channels of an output, N weights are kept, such as 2:4; for single weights"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax prune",
        description="Prunes a trained model in one shot and measures the loss before and after, on the same held-out "
        "data. Train the result further to recover (`start` of an experiment, with the view KeepZeros for masks).",
        example="slmjax prune runs/quickstart --method sparsegpt --pattern 2:4 --out runs/quickstart-2-4\n"
        "  slmjax prune runs/quickstart --method depth --sparsity 0.25 --out runs/quickstart-3-layers\n"
        "  slmjax prune runs/quickstart --method width --width model --sparsity 0.25 --out runs/quickstart-narrow",
    )
    from slmjax.compress.prune.layout import prunable
    from slmjax.convert.folder import check_free
    from slmjax.data.build_progress import show_progress
    from slmjax.models.flops import parameter_count
    from slmjax.runs.loading import load
    from slmjax.runs.pruning import METHODS, Unstructured, pattern, zeros
    from slmjax.runs.pruning_folder import write
    from slmjax.runs.pruning_width import WIDTHS

    if args.width != "ff" and args.method != "width":
        raise UserError(f"--width {args.width} is for --method width, but --method is {args.method}; leave out one")
    kind = WIDTHS[args.width] if args.method == "width" else METHODS[args.method]
    method = kind(sparsity=0.5 if args.sparsity is None else args.sparsity)
    if (n_of_m := pattern(args.pattern)) is not None:
        if args.sparsity is not None or not isinstance(method, Unstructured):
            raise UserError(f"--pattern {args.pattern} is for single weights and sets the sparsity; leave out one")
        method = METHODS[args.method](sparsity=n_of_m[0], m=n_of_m[1])
    check_free(at(args.out), overwrite=None)
    loaded = load(args.model, step=args.step)
    if loaded.packed and not loaded.foreign:
        raise UserError(f"{args.model} is quantized; prune the model that it was made from")
    held_out = opened_for(args, loaded, reads_data=method.reads_data)
    with show_progress() as progress:
        batches = tuple(held_out.validation(args.batches)) if held_out is not None and method.reads_data else ()
        model, params = method(loaded.decoder, loaded.params, batches, progress)
    about = {"method": args.method, "sparsity": method.sparsity}
    if args.method == "width":
        about["width"] = args.width
    write(at(args.out), loaded, model, params, about)
    before, after = parameter_count(loaded.decoder), parameter_count(model)
    share = zeros(params, prunable(model.axes()))
    print(f"{before:,} parameters before, {after:,} after; {share:.1%} of the layers' matrices are zero")
    print(compared(args, held_out, loaded, lambda: load(args.out)))
    out = shlex.quote(args.out)
    print(f"written to {args.out}\nnext:\n  slmjax eval {out}\n  slmjax export {out} --format hf --out {out}-hf")
    return 0
