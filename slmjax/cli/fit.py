"""`slmjax fit RUNS.csv`: a scaling law, how sure it is, and what it predicts."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

HELP = "fit a scaling law to a table of runs, with intervals, and predict"

APPROACHES = {"1": "1 (the best of each size's curve)", "2": "2 (parabolas)"}


@dataclass(frozen=True, kw_only=True)
class Args:
    runs: Annotated[str, tyro.conf.Positional]
    """A CSV or TSV file, a line for each run: loss (nats a token), and two of params, tokens, flops. Optional columns:
    unique_tokens, bits, seed, status (done, diverged), params_nonembedding, vocab, width, layers, length"""
    approach: Literal["1", "2", "3"] = "3"
    """3: fit L = E + A/N^alpha + B/D^beta. 2: a parabola a budget. 1: the best size along each size's curve (Hoffmann
    et al. 2022). 3 also tells what 1 and 2 find"""
    criterion: Literal["huber", "squared", "absolute"] = "huber"
    """What is minimised, over ln(predicted) - ln(loss)"""
    delta: float = 1e-3
    """Of huber: residuals beyond count linearly"""
    of_loss: bool = False
    """Residuals are predicted - loss, without logarithms"""
    method: Literal["projection", "grid", "full-grid"] = "projection"
    """How the search begins: variable projection, 108 points, or 4500 (slow)"""
    terms: Literal["auto", "none", "precision", "repetition", "both"] = "auto"
    """What bits and repeated data do to the law; auto: what varies in the table"""
    coupled: bool = False
    """L = E + (A/N^alpha + B/D^beta)^gamma, of one parameter more: where the note says that the sum does not fit"""
    same_exponent: bool = False
    """alpha = beta: two parameters less to identify"""
    drop_highest: int = 0
    """Runs of the highest loss to leave out"""
    draws: int = 300
    """Of the bootstrap"""
    level: float = 0.9
    """Of all intervals"""
    seed: int = 0
    """Of the bootstrap"""
    predict: tuple[str, ...] = ()
    """Runs whose loss to predict, such as params=1e9,tokens=2e10"""
    flops: float | None = None
    """Find the best params and tokens for this much compute; with the limits that follow"""
    size_bytes: float | None = None
    """The model may have so many bytes: params * bits / 8"""
    bits: tuple[float, ...] = (16.0,)
    """Bits of a weight to choose from; more than one needs a law with bits"""
    unique_tokens: float | None = None
    """So many tokens there are"""
    hold_out: float | None = None
    """Also fit the runs below this many FLOPs alone, and compare what they predict with the others"""
    supervised: str | None = None
    """Fit the law of students of a teacher (Busbridge et al. 2025) to RUNS, which has a column teacher_loss; this table
    has the runs without a teacher"""
    chance: float | None = None
    """The column metric is a downstream score between 0 and 1, this one by guessing: --predict tells the score too"""
    out: str | None = None
    """A folder for fit.json and pictures: loss.png, residuals.png, profiles.png, isoflop.png"""
    json: bool = False
    """Print JSON"""


def main(argv: list[str]) -> int:
    if argv[:1] == ["curves"]:
        from slmjax.cli.fit_curves import main as curves

        return curves(argv[1:])
    args = parse(
        Args,
        argv,
        prog="slmjax fit",
        description="Fits L = E + A/N^alpha + B/D^beta to a table of runs and says what the runs do and do not "
        "identify: intervals by bootstrap over runs, profiles, the best split of a budget, predictions.",
        example="slmjax fit runs.csv\n"
        "  slmjax fit runs.csv --predict params=1e9,tokens=2e10 --flops 1e21 --out fits/mine\n"
        "  slmjax fit runs.csv --hold-out 3e20\n"
        "  slmjax fit runs.csv --flops 1e18 --size-bytes 64e6 --bits 2 3 4 8 --json\n"
        "  slmjax fit runs.csv --approach 2\n"
        "  slmjax fit runs.csv --chance 0.25 --predict params=1e9,tokens=2e10\n"
        "  slmjax fit students.csv --supervised runs.csv --predict params=1e8,tokens=2e9,teacher_loss=2.5\n"
        "  slmjax fit curves runs/cosine runs/wsd --of runs/unfinished   (`slmjax fit curves --help`)",
    )
    from slmjax.scaling.analysis import Settings, analyse, law_for
    from slmjax.scaling.criterion import Criterion
    from slmjax.scaling.runs import drop_highest, read

    points = [named_numbers("--predict", text) for text in args.predict]
    delta = {"huber": args.delta, "squared": math.inf, "absolute": 0.0}[args.criterion]
    if args.criterion == "huber" and not 0 < args.delta < math.inf:
        raise UserError(f"--delta is {args.delta}; expected a positive number")
    settings = Settings(
        Criterion(delta, log=not args.of_loss),
        args.method,
        args.terms,
        args.same_exponent,
        args.coupled,
        args.draws,
        args.level,
        args.seed,
    )
    if args.flops is None and (args.size_bytes or args.unique_tokens or args.bits != (16.0,)):
        raise UserError("--size-bytes, --bits and --unique-tokens are limits of a run of --flops FLOPs; give those too")
    runs = drop_highest(read(at(args.runs)), args.drop_highest)
    if args.chance is not None and not points:
        raise UserError("--chance: which run's score? give it with --predict")
    if args.approach != "3":
        return _without_law(args, runs)
    if args.supervised is not None:
        from slmjax.cli.fit_more import distilled

        return distilled(args, runs, points)
    _check(args, law_for(runs, settings), runs, points)
    analysis = analyse(runs, settings)
    record = analysis.json() | _asked(args, analysis, points)
    if args.out is not None:
        from slmjax.scaling.picture import draw

        written = [str(file) for file in draw(at(args.out), analysis)]
        (at(args.out) / "fit.json").write_text(json.dumps(record, indent=1) + "\n")
        record["written"] = [str(at(args.out) / "fit.json"), *written]
    if args.json:
        print(json.dumps(record))
    else:
        from slmjax.cli.fit_tables import show

        show(args, analysis, record)
    return 0


def named_numbers(flag: str, text: str) -> dict[str, float]:
    """`params=1e9,tokens=2e10` as numbers by name."""
    out = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            out[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0 < out[name.strip()] < math.inf:
            raise UserError(f"{flag} is {text!r}; expected positive numbers by name, such as params=1e9,tokens=2e10")
    return out


def _at(point: dict[str, float], name: str) -> float:
    """A quantity of a run to predict: unless it is said, data is new and numbers have 16 bits."""
    return point.get(
        name, point.get("tokens", math.nan) if name == "unique_tokens" else 16.0 if "bits" in name else math.nan
    )


def _check(args: Args, law: Any, runs: Any, points: list[dict[str, float]]) -> None:
    """Raises UserError for what the law or the table has no answer to, before anything is fitted."""
    from slmjax.scaling.planning import Limits, parted

    for point in points:
        known = ", ".join(law.columns)
        if unknown := point.keys() - set(law.columns):
            raise UserError(f"--predict: the law knows no {', '.join(sorted(unknown))}; it has {known}")
        if missing := [name for name in law.columns if math.isnan(_at(point, name))]:
            raise UserError(f"--predict: {', '.join(missing)} is not given; the law needs {known}")
    if args.flops is not None:
        Limits(args.flops, args.size_bytes, args.bits, args.unique_tokens, runs.cost).check(law)
    if args.hold_out is not None:
        parted(runs, args.hold_out)


def _asked(args: Args, analysis: Any, points: list[dict[str, float]]) -> dict[str, Any]:
    """Predictions, the best run within limits, held-out errors: what was asked for."""
    from slmjax.scaling.planning import Limits, best, held_out

    out: dict[str, Any] = {}
    law, draws, runs = analysis.fitted.law, analysis.draws, analysis.runs
    if points:
        out["predictions"] = []
    for point in points:
        found = draws.predict(**{name: _at(point, name) for name in law.columns})
        out["predictions"].append(point | found.json())
    if args.chance is not None:
        from slmjax.cli.fit_more import scores

        at = [{name: _at(point, name) for name in law.columns} for point in points]
        for found, score in zip(out["predictions"], scores(runs, draws, at, args.chance, args.seed), strict=True):
            found["score"] = score
    if args.flops is not None:
        limits = Limits(args.flops, args.size_bytes, args.bits, args.unique_tokens, runs.cost)
        found = best(draws, limits)
        if args.size_bytes is None and (reason := analysis.estimates["a"].reason):
            found = replace(found, params=found.params.because(reason), tokens=found.tokens.because(reason))
        out["best"] = {"flops": args.flops} | found.json()
    if args.hold_out is not None:
        found = held_out(draws, runs, args.hold_out, count=args.draws, seed=args.seed, level=args.level)
        out["held_out"] = found.json()
    return out


def _without_law(args: Args, runs: Any) -> int:
    """Approaches 1 and 2: how the best size grows, and nothing about the loss."""
    from slmjax.scaling import approaches

    if args.predict or args.hold_out is not None or args.out is not None:
        raise UserError(
            f"approach {args.approach} has no law of the loss; --predict, --hold-out, --out need approach 3"
        )
    if args.approach == "1":
        found = approaches.envelope(runs, level=args.level)
    else:
        found = approaches.isoflop(runs, level=args.level, draws=args.draws, seed=args.seed)
    record: dict[str, Any] = {"approach": int(args.approach), "a": found.a.json(), "b": found.b.json()}
    record["minima"] = [
        {"flops": m.flops, "runs": len(m.runs)} | ({"rejected": m.rejected} if m.rejected else {"params": m.params})
        for m in found.minima
    ]
    if args.flops is not None:
        record["best"] = {"flops": args.flops, "params": found.params(args.flops), "tokens": found.tokens(args.flops)}
    if args.json:
        print(json.dumps(record))
        return 0
    print(f"approach {APPROACHES[args.approach]}: N* ~ C^a, D* ~ C^b, from {len(runs)} runs")
    print(f"  a: {found.a}\n  b: {found.b}")
    for m in found.minima:
        print(f"  C={m.flops:.3g}, {len(m.runs)} runs: " + (m.rejected or f"best params {m.params:.4g}"))
    if args.flops is not None:
        best = record["best"]
        print(f"best at C={args.flops:.3g}: params {best['params']:.4g}, tokens {best['tokens']:.4g}")
    print(f"next:\n  slmjax fit {shlex.quote(args.runs)}")
    return 0
