"""`slmjax verify mup EXPERIMENT`: do activations and the best learning rate stay where they are as a model grows?"""

from __future__ import annotations

import csv
import io
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmjax.cli.args import parse
from slmjax.errors import StorageError, UserError

if TYPE_CHECKING:
    from slmjax.runs.mup_check import Measured, Plan, Verdict

PROG = "slmjax verify mup"
EXAMPLE = "slmjax verify mup experiments/scaling/mup_transfer.py --widths 32 64 128 --out runs/mup -- --data.batch 4"
ABOUT = """Trains small models of the experiment's kind, wider and deeper ones, at several learning rates: once under a
parametrisation, once under the standard one as the control. Under the parametrisation the activations of every matrix,
and how far they moved in the first steps, must keep their size (the coordinate check), and the best learning rate must
move by at most one step of the grid. Writes coordinates.tsv, learning_rates.tsv and a picture of each. Exits with 5 if
the parametrisation fails. What follows ` -- ` overrides fields of the experiment, as in `slmjax train`."""


@dataclass(frozen=True)
class Args:
    widths: tuple[int, ...] = (32, 64, 128)
    """Widths of models with the fewest layers; the first is the base"""
    depths: tuple[int, ...] = (2, 8)
    """Layers of models with the smallest width; the first is the base"""
    rates: int = 5
    """How many learning rates: the experiment's peak, and others by factors of `factor` around it"""
    factor: float = 2.0
    """Between one learning rate and the next"""
    steps: int = 100
    """Steps of each training"""
    few: int = 20
    """Steps after which activations are measured; more than the warm-up, which takes at most a tenth of `steps`"""
    tolerance: float = 0.45
    """How steep an activation may be: the power of the width (or depth) with which it grows. 0 is flat; sums that a
    wrong multiplier leaves grow with a power of 0.5 or 1"""
    parametrisation: typing.Literal["completep", "mup", "completedp"] = "completep"
    """What is proved; mup compares widths alone"""
    control: bool = True
    """Also train under the standard parametrisation (--no-control: half the time)"""
    out: str = ""
    """Folder of the results; default: runs/verify-mup/ and the experiment's name"""

    def __post_init__(self) -> None:
        if self.rates < 3 or self.rates % 2 == 0:
            raise UserError(f"--rates is {self.rates}; expected an odd number, 3 or more: a peak, and others around it")
        if not self.factor > 1:
            raise UserError(f"--factor is {self.factor}; expected more than 1")
        if not self.tolerance > 0:
            raise UserError(f"--tolerance is {self.tolerance}; expected more than 0")


class NotTransferred(UserError):
    """A parametrisation does not keep what it promises to keep."""

    code = StorageError.code


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    own, overrides = argv[:cut], argv[cut + 1 :]
    if not own or own[0].startswith("-"):
        parse(Args, own, prog=f"{PROG} EXPERIMENT", description=ABOUT, example=EXAMPLE)
        raise UserError(f"{PROG} needs an EXPERIMENT first; for example: {EXAMPLE}")
    return verify(own[0], parse(Args, own[1:], prog=PROG, description=ABOUT, example=EXAMPLE), overrides)


def verify(ref: str, args: Args, overrides: list[str]) -> int:
    """Trains, writes what was measured, and prints the verdicts.

    Raises:
        UserError: the experiment's model is of a kind that parametrisations do not scale.
        NotTransferred: an activation is not flat, or the best learning rate moves too far.
    """
    from slmjax.cli.experiment_args import parse as parse_experiment
    from slmjax.models.parametrisation import SP, CompletedP, CompleteP, MuP
    from slmjax.runs.launch import open_data
    from slmjax.runs.mup_check import Measured, Plan, base_of, measure, verdicts

    experiment, runtime, _ = parse_experiment([ref, *overrides], PROG, ABOUT, EXAMPLE)
    out = Path(args.out or f"runs/verify-mup/{experiment.name}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give another folder, or remove it")
    middle, depths = args.rates // 2, args.depths[:1] if args.parametrisation == "mup" else args.depths
    rates = tuple(experiment.schedule.peak_lr * args.factor ** (i - middle) for i in range(args.rates))
    plan = Plan(widths=args.widths, depths=depths, rates=rates, steps=args.steps, few=args.few)
    base = base_of(experiment, plan)
    stream = open_data(base, runtime, None).training(host=0, hosts=1)
    batches = [next(stream) for _ in range(plan.steps)]
    kinds = {"completep": CompleteP, "mup": MuP, "completedp": CompletedP}
    chosen = kinds[args.parametrisation](base=base.model)
    print(f"{len(plan.sizes)} sizes at {len(rates)} learning rates, {plan.steps} steps each", flush=True)
    found = {type(chosen).__name__: measure(base, chosen, plan, batches, _say)}
    if args.control:
        of = found[type(chosen).__name__]  # at the size of the base both are the same
        known = Measured({plan.base: of.coordinates[plan.base]}, {plan.base: of.losses[plan.base]})
        found["SP"] = measure(base, SP(base=base.model), plan, batches, _say, known)
    judged = {name: verdicts(name, measured, plan, args.tolerance) for name, measured in found.items()}
    _write(out, found, plan)
    for name, each in judged.items():
        for verdict in each:
            print(_words(verdict, plan, control=name == "SP"))
    print(f"written: {out}")
    failed = [verdict for verdict in judged[type(chosen).__name__] if not (verdict.flat and verdict.transfers)]
    if failed:
        verdict = failed[0]
        what = f"{', '.join(verdict.uneven)} not flat" if verdict.uneven else "the best learning rate moves"
        raise NotTransferred(f"{verdict.name} fails along {verdict.axis}: {what}; see {out}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _words(verdict: Verdict, plan: Plan, control: bool) -> str:
    """Two lines for the terminal."""
    steepest = max(verdict.slopes, key=lambda name: max(map(abs, verdict.slopes[name])))
    size, change = verdict.slopes[steepest]
    rates = " ".join("none" if i is None else f"{plan.rates[i]:.3g}" for i in verdict.best)
    flat = "flat" if verdict.flat else f"not flat ({', '.join(verdict.uneven)})"
    lines = [
        f"{verdict.name}{' (control)' if control else ''}, {verdict.axis} "
        f"{' '.join(str(getattr(s, verdict.axis)) for s in verdict.sizes)}:",
        f"  activations: {flat}; steepest {steepest}: size {size:+.2f}, change {change:+.2f} (tolerance "
        f"{verdict.tolerance:g})",
        f"  best learning rate: {rates}: moves {verdict.moved:g} steps of the grid",
    ]
    if verdict.at_edge:
        lines.append("  at the edge of the grid: move it with -- --schedule.peak-lr, or widen it with --rates")
    return "\n".join(lines)


def _write(out: Path, found: dict[str, Measured], plan: Plan) -> None:
    from slmjax.files import write_text
    from slmjax.track.picture import Curve, Plot, curves

    places = [(name, axis, size) for name in found for axis, sizes in plan.axes.items() for size in sizes]
    coordinates, rates = [], []
    for name, axis, size in places:
        at = found[name].coordinates[size]
        coordinates += [(name, axis, *size, path, at.size[path], at.change[path]) for path in at.size]
        losses = found[name].losses[size]
        rates += [(name, axis, *size, rate, loss) for rate, loss in zip(plan.rates, losses, strict=True)]
    head = ("parametrisation", "axis", "width", "layers")
    write_text(out / "coordinates.tsv", _tsv((*head, "activation", "size", "change"), coordinates))
    write_text(out / "learning_rates.tsv", _tsv((*head, "peak_lr", "loss"), rates))
    moved, best = [], []
    for name, measured in found.items():
        for axis, sizes in plan.axes.items():
            x = [getattr(size, axis) for size in sizes]
            of = [measured.coordinates[size].change for size in sizes]
            lines = [Curve(path, x, [each[path] for each in of]) for path in of[0]]
            moved.append(Plot(f"{name}: change in {plan.few} steps", axis, lines))
            lines = [Curve(f"{axis} {getattr(size, axis)}", plan.rates, measured.losses[size]) for size in sizes]
            best.append(Plot(name, "peak learning rate", lines))
    curves(out / "coordinates.png", moved, y_label="root mean square", log_y=True)
    curves(out / "learning_rates.png", best, y_label="loss, nats a token")


def _tsv(head: tuple[str, ...], rows: list[tuple]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(
            f"{x:.6g}" if isinstance(x, float) and math.isfinite(x) else "" if x == math.inf else x for x in row
        )
    return text.getvalue()
