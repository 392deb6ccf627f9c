"""`slmjax report RUN...`: a run's report.html, written again; of several runs, a page that compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError
from slmjax.files import at

HELP = "rebuild a run's report.html from its records, or compare several runs"


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, finished, running or interrupted; of several, also folders that `slmjax quantize` wrote"""
    out: str = "comparison.html"
    """The page that compares several"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax report",
        description="Of one run: writes its report.html from config.json, metrics.jsonl and ledger.jsonl. Of several: "
        "one page with the loss against tokens, FLOPs, time and bytes on disk; runs that differ in their seed alone "
        "are one line with a 95% interval. Both can be viewed offline.",
        example="slmjax report runs/quickstart\n  slmjax report runs/quickstart runs/two-bits --out comparison.html",
    )
    if not args.runs:
        raise UserError("which run? give the folder of one, or of several to compare them")
    for run in args.runs:
        if not (at(run) / "config.json").is_file():
            raise UserError(f"{run}: not a run folder (no config.json); give one that `slmjax train` made")
    if len(args.runs) == 1:
        from slmjax.track import report

        print(report.write(at(args.runs[0])))
        return 0
    from slmjax.runs.comparing import entry
    from slmjax.track import comparison

    print(comparison.write(at(args.out), [entry(run) for run in args.runs]))
    return 0
