"""The fit while a sweep runs, on made-up runs of a known surface; nothing is trained."""

import json
import re
from hashlib import sha256

import numpy as np
import pytest
from running import slmjax
from small_cells import base, made_up, planned, ran

from slmjax.errors import UserError
from slmjax.scaling.analysis import Settings
from slmjax.sweeps import narrowing, predicting
from slmjax.sweeps.cells import Cell
from slmjax.sweeps.running import run
from slmjax.sweeps.watching import share

SIZES = (2000, 6000, 18000, 54000)
QUICK = Settings(draws=200)


def loss(n, d, noise=0.0):
    return (1.7 + 30.0 / n**0.35 + 90.0 / d**0.35) * np.exp(noise)


@pytest.fixture
def folder(tmp_path):
    """20 cells, of which 14 are complete, and a held-out one that cannot start."""
    points = [(n, round(c / 6 / n)) for c in (1e9, 3e9, 1e10, 3e10, 1e11) for n in SIZES]
    pairs = [
        (cell := Cell(experiment=base(seed=i)), planned(cell, params=n, tokens=d)) for i, (n, d) in enumerate(points)
    ]
    held = Cell(experiment=base(steps=11), tags={"budget": 1e12})
    last = planned(held, params=120_000, tokens=1_400_000, held_out=True, code=True)
    made = made_up(tmp_path / "s", [*pairs, (held, last)], source="nowhere.py")
    rng = np.random.default_rng(0)
    for cell in made.cells[:14]:
        ran(made, cell, loss=float(loss(cell.params, cell.tokens, 0.004 * rng.standard_normal())))
    return made


def test_the_proposed_cell_narrows_the_interval_most(folder):
    """Against the truth: each waiting cell is run, at the law's own loss there, and everything fitted again."""
    found = narrowing.current(folder, settings=QUICK)
    truth = loss(120_000, 1_400_000)
    assert found.prediction.mean.low < truth < found.prediction.mean.high
    assert found.runs == 14
    waiting = narrowing.waiting(folder, folder.states())
    offered = narrowing.proposals(found, waiting)
    assert {each.cell.hash for each in offered} == {cell.hash for cell in folder.cells[14:20]}
    assert all(each.half_width <= found.half_width for each in offered)
    after = {}
    for each in (offered[0], offered[-1]):
        cell = each.cell
        ran(folder, cell, loss=float(found.draws.fitted.predict({"params": cell.params, "tokens": cell.tokens})[0]))
        after[cell.hash] = narrowing.current(folder, settings=QUICK).half_width
        (folder.run(cell) / "ledger.jsonl").unlink()
        (folder.run(cell) / "metrics.jsonl").unlink()
    assert after[offered[0].cell.hash] < min(after[offered[-1].cell.hash], found.half_width)

    shown = slmjax("sweep", "status", folder.path).out
    assert "fit of 14 runs: loss" in shown
    assert "the next cell that helps most:" in shown
    table = slmjax("sweep", "propose", folder.path, "--count", "2").out
    assert table.count("±") == 3
    elsewhere = slmjax("sweep", "propose", folder.path, "--target", "params=1e6,tokens=2e7")
    assert "params 1e+06, tokens 2e+07" in elsewhere.out
    assert slmjax("sweep", "propose", folder.path, "--target", "params=1e6").code == 2
    for cell in waiting:
        ran(folder, cell, loss=float(loss(cell.params, cell.tokens)))
    assert "runs that the sweep does not have" in slmjax("sweep", "propose", folder.path).out


def test_enough_cells_and_the_prediction_before_the_run(folder):
    """No cell is begun that is not needed. The held-out one is predicted, and only then started (it then fails)."""
    said = []
    with pytest.raises(UserError, match="14 of 21 cells complete, 6 dropped, 1 failed"):
        run(folder, until=0.5, say=said.append)
    assert re.match(r"fit of 14 runs: loss .* ± \d\.\d\d% \(90% interval", said[0])
    assert said[1] == "6 cells are left out: the interval is at most 50.00%"
    last = folder.held_out
    events = [event for event in folder.events() if event["cell"] == last.hash]
    assert [event["event"] for event in events] == ["predicted", "started", "failed"]
    written = folder.path / predicting.FILE
    assert events[0]["sha256"] == sha256(written.read_bytes()).hexdigest()
    assert json.loads(written.read_text())[last.hash]["fitted_runs"] == 14
    states = folder.states()
    assert "not needed: after 14 runs the interval is" in states[folder.cells[15].hash].reason
    narrowing.take_back(folder, states)  # what a run without a limit does
    assert len(narrowing.waiting(folder, folder.states())) == 6


@pytest.mark.fast
def test_an_interval_in_percent(tmp_path):
    assert share("1.5%") == pytest.approx(0.015)
    assert share("0.02") == 0.02
    for text in ("150%", "-1", "narrow"):
        with pytest.raises(UserError, match="--until-interval is"):
            share(text)
    cell = Cell(experiment=base())
    alone = made_up(tmp_path / "s", [(cell, planned(cell))])
    with pytest.raises(UserError, match="no held-out cell to predict"):
        run(alone, until=0.1)
    with pytest.raises(UserError, match="name what to predict"):
        narrowing.current(alone)
