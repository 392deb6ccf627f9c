"""`slmjax prune MODEL --out DIR`: zeros in the weights, or fewer layers or channels, with the loss before and after."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError

HELP = "remove weights, layers or channels of a trained model"


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint, a Hugging Face folder or a GGUF file"""
    out: str
    """The folder to write; every verb takes it as MODEL"""
    method: Literal["magnitude", "wanda", "sparsegpt", "depth", "width"] = "sparsegpt"
    """magnitude, wanda, sparsegpt: zeros in the matrices of the layers, which makes nothing faster. depth: fewer
    layers. width: fewer hidden channels in the feed-forward layers"""
    sparsity: float | None = None
    """Share of the weights, layers or hidden channels that is removed; default: 0.5, or as `pattern` says"""
    pattern: str | None = None
    """N:M: of each M consecutive input channels of an output, N weights are kept, such as 2:4; for single weights"""
    data: str | None = None
    """Calibration data: a token store, whose validation split is read; default: the validation data of the run"""
    batches: int = 16
    """Batches of calibration data"""
    batch: int = 8
    """Sequences a batch"""
    length: int | None = None
    """Tokens a sequence; default: as in training, or the model's context up to 1024"""
    step: int | None = None
    """The checkpoint of a run; default: the latest"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax prune",
        description="Prunes a trained model in one shot and measures the loss before and after, on the same held-out "
        "data. Train the result further to recover (`start` of an experiment, with the view KeepZeros for masks).",
        example="slmjax prune runs/quickstart --method sparsegpt --pattern 2:4 --out runs/quickstart-2-4\n"
        "  slmjax prune runs/quickstart --method depth --sparsity 0.25 --out runs/quickstart-3-layers",
    )
    from slmjax.compress.prune.layout import prunable
    from slmjax.convert.folder import check_free
    from slmjax.data.build_progress import show_progress
    from slmjax.models.flops import parameter_count
    from slmjax.runs.evaluating import HeldOut, measure, opened
    from slmjax.runs.loading import load
    from slmjax.runs.pruning import METHODS, Unstructured, pattern, zeros
    from slmjax.runs.pruning_folder import write

    method = METHODS[args.method](sparsity=0.5 if args.sparsity is None else args.sparsity)
    if (n_of_m := pattern(args.pattern)) is not None:
        if args.sparsity is not None or not isinstance(method, Unstructured):
            raise UserError(f"--pattern {args.pattern} is for single weights and sets the sparsity; leave out one")
        method = METHODS[args.method](sparsity=n_of_m[0], m=n_of_m[1])
    check_free(Path(args.out), overwrite=None)
    loaded = load(args.model, step=args.step)
    if loaded.packed:
        raise UserError(f"{args.model} is quantized; prune the model that it was made from")
    held_out = None
    if args.data is not None or loaded.experiment is not None or method.reads_data:
        held_out = opened(HeldOut(data=args.data, batch=args.batch, length=args.length), loaded)
    with show_progress() as progress:
        batches = tuple(held_out.validation(args.batches)) if held_out is not None and method.reads_data else ()
        model, params = method(loaded.decoder, loaded.params, batches, progress)
    write(Path(args.out), loaded, model, params, {"method": args.method, "sparsity": method.sparsity})
    before, after = parameter_count(loaded.decoder), parameter_count(model)
    share = zeros(params, prunable(model.axes()))
    print(f"{before:,} parameters before, {after:,} after; {share:.1%} of the layers' matrices are zero")
    if held_out is not None and not loaded.decoder.labels:
        old: Any = measure(loaded, held_out, batches=args.batches)
        new: Any = measure(load(args.out), held_out, batches=args.batches)
        change = new.loss.value - old.loss.value
        print(
            f"loss {old.loss.value:.4f} before, {new.loss.value:.4f} after: {change:+.4f} nats a token, on "
            f"{int(old.tokens):,} held-out tokens"
        )
    else:
        print("loss not measured: add --data with a token store")
    out = shlex.quote(args.out)
    print(f"written to {args.out}\nnext:\n  slmjax eval {out}\n  slmjax export {out} --format hf --out {out}-hf")
    return 0
