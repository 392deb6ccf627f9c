"""What `slmjax fit` prints, as tables."""

from __future__ import annotations

import math
import shlex
from typing import Any

from slmjax.cli import tables
from slmjax.scaling.conventions import CONVENTIONS
from slmjax.scaling.coupled import Coupled
from slmjax.scaling.estimated import Estimated


def show(args: Any, analysis: Any, record: dict[str, Any]) -> None:
    """Prints an analysis: parameters, approaches, what was asked for, notes, and a next step."""

    console = tables.console()
    rms = record["residuals"]["rms"]
    print(f"{len(analysis.runs)} runs, {law_text(analysis)}; residuals of {rms:.2%} (rms), {_criterion(args)}")
    tables.show(_parameters(analysis), console)
    tables.show(_approaches(analysis), console)
    if analysis.conventions:
        tables.show(_conventions(analysis), console)
    if analysis.seeds.identified:
        print(f"seeds of one cell differ by {_percent(analysis.seeds)} (standard deviation)")
    for found in record.get("predictions", ()):
        at = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
        print(f"predicted loss at {at}: {_interval(found['mean'])}; of one run: {_interval(found['run'], False)}")
        if "score" in found:
            print(f"  score there: {_interval(found['score'])}")
    if "best" in record:
        _best(args, record["best"])
    if "held_out" in record:
        _held_out(record["held_out"], args.level)
    for note in analysis.notes:
        print(f"note: {note}")
    for file in record.get("written", ()):
        print(f"written: {file}")
    print(f"next:\n  {_next(args, analysis)}")


def law_text(analysis: Any) -> str:
    """The law, as people write it."""
    law = analysis.fitted.law
    symbols = {"params": "N", "tokens": "D"}
    parts = [law.floor]
    for term in law.terms:
        below = "".join(
            f"{symbols.get(f.quantity.columns[0], f.quantity.columns[0])}{_mark(f.quantity)}^{f.exponent}"
            for f in term.factors
        )
        parts.append(f"{term.coefficient}/{below}")
    if isinstance(law, Coupled):
        return f"L = {law.floor} + ({' + '.join(parts[1:])})^{law.power}"
    return "L = " + " + ".join(parts)


def _mark(quantity: Any) -> str:
    """_eff for parameters at few bits, ' for data that repeats."""
    others = quantity.columns[1:]
    return "" if not others else "'" if "unique_tokens" in others else "_eff"


def _criterion(args: Any) -> str:
    names = {
        "huber": f"Huber, delta {args.delta:g}",
        "squared": "least squares",
        "absolute": "least absolute deviations",
    }
    return names[args.criterion] + (" of the loss" if args.of_loss else " of ln(loss)")


def _parameters(analysis: Any) -> Any:
    from rich.table import Table

    level = f"{analysis.draws.level:.0%}"
    table = Table(title="The law", title_justify="left")
    for column in ("", "value", f"{level}, bootstrap", f"{level}, profile", "SE"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for name, estimate in analysis.estimates.items():
        label = "a: best N ~ C^a" if name == "a" else name
        if not estimate.identified:
            table.add_row(label, "not identified", estimate.reason, "", "")
            continue
        profile = analysis.profiles.get(name)
        ends = "" if profile is None else _ends(profile.estimate.low, profile.estimate.high)
        se = "" if math.isnan(estimate.se) else f"{estimate.se:.2g}"
        table.add_row(label, f"{estimate.value:.5g}", _ends(estimate.low, estimate.high), ends, se)
    return table


def _approaches(analysis: Any) -> Any:
    from rich.table import Table

    table = Table(title="Best N ~ C^a, by approach", title_justify="left")
    for column in ("approach", "a"):
        table.add_column(column, overflow="fold")
    table.add_row("3: the law", str(analysis.estimates["a"]))
    names = {"2": "2: parabolas", "1": "1: best of each size"}
    for key, name in names.items():
        found = analysis.others[key]
        text = found if isinstance(found, str) else str(found.a)
        if key == "2" and analysis.bias is not None:
            bias = analysis.bias
            text += (
                f"; on these cells of a surface without noise it would be off by {bias.a:+.4f} in a, and at "
                f"C={bias.flops:.2g} by {bias.params:+.1%} in N, {bias.tokens:+.1%} in D"
            )
        table.add_row(name, text)
    return table


def _conventions(analysis: Any) -> Any:
    from rich.table import Table

    table = Table(title="a, by what counts as FLOPs a token", title_justify="left")
    for column in ("convention", "a"):
        table.add_column(column)
    for name, estimate in analysis.conventions.items():
        table.add_row(CONVENTIONS[name], str(estimate))
    return table


def _best(args: Any, best: dict[str, Any]) -> None:
    within = "" if args.size_bytes is None else f" in {args.size_bytes:.4g} bytes"
    print(f"best for {best['flops']:.3g} FLOPs{within}:")
    print(f"  params {_interval(best['params'])}\n  tokens {_interval(best['tokens'])}")
    if len(best["choices"]) > 1:
        share = best["choices"].get(f"{best['bits']:g}", 0.0)
        print(f"  {best['bits']:g} bits, as {share:.0%} of the refits choose")
    print(f"  loss {_interval(best['mean'])}; of one run: {_interval(best['run'], False)}")


def _held_out(found: dict[str, Any], level: float) -> None:
    print(
        f"held out: {found['predicted']} runs, predicted from {found['fitted']}: errors {found['median_error']:.2%} "
        f"(median), {found['largest_error']:.2%} (largest), {found['error_of_most_expensive']:+.2%} (most expensive); "
        f"{found['inside_interval']:.0%} inside their {level:.0%} interval; a line without a floor: "
        f"{found['median_error_of_a_line_without_floor']:.2%} (median)"
    )


def _next(args: Any, analysis: Any) -> str:
    """The command, or the runs, that help most now."""
    file = shlex.quote(args.runs)
    reasons = [estimate.reason for estimate in analysis.estimates.values() if not estimate.identified]
    if reasons:
        most = max(reasons, key=reasons.count)
        return f"add runs to {file} and fit again ({most})"
    if args.hold_out is None:
        flops = sorted(set(analysis.runs["flops"].tolist()))
        return f"slmjax fit {file} --hold-out {flops[int(0.8 * len(flops))]:.3g}"
    if args.flops is None:
        return f"slmjax fit {file} --flops {10 * analysis.runs['flops'].max():.2g}"
    return (
        f"slmjax fit {file} --out fit" if args.out is None else f"train what is best, add it to {file}, and fit again"
    )


def _ends(low: float, high: float) -> str:
    return f"{low:.4g} .. {high:.4g}"


def _interval(found: dict[str, Any], value: bool = True) -> str:
    if "reason" in found:
        return f"not identified: {found['reason']}"
    ends = f"[{found['low']:.4g}, {found['high']:.4g}]"
    return f"{found['value']:.4g} {ends}" if value else ends


def _percent(found: Estimated) -> str:
    return f"{found.value:.2%} [{found.low:.2%}, {found.high:.2%}]"
