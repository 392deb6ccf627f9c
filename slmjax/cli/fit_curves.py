"""`slmjax fit curves CURVE ...`: where the loss of a run will end, from its learning rates and other curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError

if TYPE_CHECKING:
    from slmjax.scaling.curves import Curve


@dataclass(frozen=True, kw_only=True)
class Args:
    curves: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, finished or not, or CSV files with the columns step, lr, loss, of models of one size and data"""
    of: str | None = None
    """The run folder or CSV file whose end to predict (in a CSV, an empty loss is a step to come). Its own losses so
    far are fitted too"""
    hold_out: bool = False
    """Fit the other curves alone, and compare what they say with the losses of --of"""
    warmup: int = 0
    """Steps of warm-up before the first line of a CSV"""
    json: bool = False
    """Print JSON"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax fit curves",
        description="Fits the multi-power law (Luo et al. 2025, arXiv:2503.12811) to curves of the training loss under "
        "different learning rates, and predicts the loss at the end of another schedule, or of a run that is not "
        "finished. It has no interval: points of one curve are not independent. Check it with --hold-out.",
        example="slmjax fit curves runs/cosine runs/wsd --of runs/unfinished\n"
        "  slmjax fit curves a.csv b.csv --of c.csv --hold-out --json",
    )
    import numpy as np

    from slmjax.scaling.curves import together
    from slmjax.scaling.fit import fit

    if args.hold_out and args.of is None:
        raise UserError("--hold-out: which curve? give it with --of")
    seen = [_curve(name, args.warmup) for name in args.curves]
    asked = None if args.of is None else _curve(args.of, args.warmup)
    if asked is not None and not args.hold_out and len(asked.step):
        seen.append(asked)
    if not any(len(curve.step) for curve in seen):
        raise UserError("none of the curves has a loss; give at least one run that has trained")
    law, columns = together(seen)
    fitted = fit(law, columns)
    record: dict[str, Any] = {
        "curves": len(seen),
        "points": len(columns["loss"]),
        "parameters": fitted.values,
        "residuals": {"rms": float(np.sqrt(np.mean(fitted.residuals**2)))},
    }
    if not any(_decays(curve) for curve in seen):
        record["note"] = "no curve has a loss after its learning rate has fallen: what a decay brings is a guess"
    if asked is not None:
        end = len(asked.schedule.lr) - 1
        steps = np.asarray([*asked.step, end])
        other, at = together([type(asked)(asked.schedule, steps, np.ones(len(steps)))])
        predicted = np.exp(other.log_loss(fitted.theta[None], at)[0][0])
        record["of"] = {"file": args.of, "step": end + 1, "loss": float(predicted[-1])}
        if args.hold_out and len(asked.step):
            errors = predicted[:-1] / asked.loss - 1
            record["of"] |= {"mean_error": float(np.abs(errors).mean()), "error_of_last": float(errors[-1])}
    print(json.dumps(record) if args.json else _text(record, args))
    return 0


def _curve(name: str, warmup: int) -> Curve:
    from slmjax.scaling.curves import read_curve

    path = Path(name)
    if not path.exists():
        raise UserError(f"{name}: no such run folder or CSV file")
    if path.is_dir():
        from slmjax.runs.learning_curves import of_run

        return of_run(path)
    return read_curve(path, warmup)


def _decays(curve: Curve) -> bool:
    """Whether a loss was measured after the learning rate had fallen by a tenth."""
    lr = curve.schedule.lr
    return bool(len(curve.step)) and bool(lr[int(curve.step[-1])] < 0.9 * lr.max())


def _text(record: dict[str, Any], args: Args) -> str:
    lines = [
        f"{record['points']} points of {record['curves']} curves; residuals of {record['residuals']['rms']:.2%} (rms)",
        "  " + ", ".join(f"{name} {value:.4g}" for name, value in record["parameters"].items()),
    ]
    if "note" in record:
        lines.append(f"note: {record['note']}")
    if "of" in record:
        of = record["of"]
        lines.append(f"{of['file']}: loss {of['loss']:.4f} after step {of['step']}, by the law")
        if "mean_error" in of:
            lines.append(f"  held out: mean error {of['mean_error']:.2%}, of the last point {of['error_of_last']:+.2%}")
    more = "" if args.of else " --of RUN"
    check = "" if args.hold_out else " --hold-out"
    lines.append(f"next:\n  slmjax fit curves {' '.join(args.curves)}{f' --of {args.of}' if args.of else more}{check}")
    return "\n".join(lines)
