"""`slmjax fit --supervised` and `--chance`: students of a teacher, and downstream scores."""

from __future__ import annotations

import json
import math
from typing import Any

from slmjax.errors import UserError


def scores(runs: Any, draws: Any, points: list[dict[str, float]], chance: float, seed: int) -> list[dict[str, Any]]:
    """Of each point the predicted score: the sigmoid of the loss that the table's column `metric` follows.

    Raises:
        UserError: the table has no such column, or too few runs have a score.
    """
    from slmjax.scaling.downstream import link, predict_score

    if "metric" not in runs.columns:
        raise UserError(f"--chance: {runs.source} has no column metric (a score of each run, between 0 and 1)")
    found = link(runs["loss"], runs["metric"], chance=chance, draws=len(draws.theta), seed=seed)
    return [predict_score(draws, found, **point).json() for point in points]


def distilled(args: Any, runs: Any, points: list[dict[str, float]]) -> int:
    """Fits the law of students of a teacher, and prints it.

    Raises:
        UserError: the table has no column teacher_loss, or too few runs.
    """
    from slmjax.scaling.analysis import Settings, law_for
    from slmjax.scaling.fit import fit
    from slmjax.scaling.joint import Distillation
    from slmjax.scaling.runs import read
    from slmjax.scaling.uncertainty import bootstrap

    if "teacher_loss" not in runs.columns:
        raise UserError(f"--supervised: {args.runs} has no column teacher_loss (nats a token, of each run's teacher)")
    for flag, value in (("--flops", args.flops), ("--hold-out", args.hold_out), ("--out", args.out)):
        if value is not None:
            raise UserError(f"{flag}: the law of students predicts losses only; leave it out")
    alone = read(args.supervised)
    settings = Settings(draws=args.draws, level=args.level, seed=args.seed)
    supervised = fit(law_for(alone, settings), alone.columns)
    law = Distillation(supervised)
    for point in points:
        if missing := set(law.columns) - point.keys():
            raise UserError(f"--predict: {', '.join(sorted(missing))} is not given; expected {', '.join(law.columns)}")
    fitted = fit(law, runs.columns)
    draws = bootstrap(fitted, args.draws, level=args.level, seed=args.seed, cells=runs.cells)
    rms = math.sqrt(float((fitted.residuals**2).mean()))
    record: dict[str, Any] = {
        "runs": len(runs),
        "residuals": {"rms": rms},
        "supervised": {"runs": len(alone), "parameters": supervised.values},
        "parameters": {name: found.json() for name, found in draws.parameters().items()},
        "predictions": [point | draws.predict(**point).json() for point in points],
    }
    if args.json:
        print(json.dumps(record))
        return 0
    print(f"{len(runs)} students, {len(alone)} runs without a teacher; residuals of {rms:.2%} (rms)")
    print("L_S = L_T + L_T^-c0 (1 + (L_T / (d1 L~_S))^(1/f1))^(-c1 f1) (A'/N^alpha' + B'/D^beta')^gamma'")
    print("  the values trade against each other; trust predictions:")
    for name, found in draws.parameters().items():
        print(f"  {name}: {found}")
    for found in record["predictions"]:
        at = ", ".join(f"{name} {found[name]:.4g}" for name in law.columns)
        mean, run = found["mean"], found["run"]
        print(
            f"predicted loss at {at}: {mean['value']:.4f} [{mean['low']:.4f}, {mean['high']:.4f}]; of one run: "
            f"[{run['low']:.4f}, {run['high']:.4f}]"
        )
    ask = "--predict params=1e8,tokens=2e9,teacher_loss=2.5"
    print(f"next:\n  slmjax fit {args.runs} --supervised {args.supervised} {ask}")
    return 0
