"""`slmjax report RUN`: writes a run's report.html again from its records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from slmjax.cli.args import parse
from slmjax.errors import UserError

HELP = "rebuild a run's report.html from its records"


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """A run folder; the run may be finished, running or interrupted"""


def main(argv: list[str]) -> int:
    args = parse(
        Args,
        argv,
        prog="slmjax report",
        description="Writes report.html from config.json, metrics.jsonl and ledger.jsonl. It can be viewed offline.",
        example="slmjax report runs/quickstart",
    )
    from slmjax.track.report import write

    folder = Path(args.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{args.run}: not a run folder (no config.json); give one that `slmjax train` made")
    print(write(folder))
    return 0
