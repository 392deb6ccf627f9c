"""States, results, predictions and the report of made-up runs; nothing is trained."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from running import slmjax
from small_cells import base, isoflops, made_up, noisy, planned, ran, surface

from slmjax.errors import Diverged, UserError
from slmjax.lease import lease
from slmjax.scaling.analysis import Settings, analyse
from slmjax.scaling.runs import read as read_runs
from slmjax.sweeps import folder as folders
from slmjax.sweeps import grouping, narrowing, planning, predicting, report, wandb_sweep
from slmjax.sweeps.cells import Cell
from slmjax.sweeps.making import grid, halving, seeds
from slmjax.sweeps.running import command, run
from slmjax.track.jsonl import encode, read


def taken(owner):
    return UserError(owner)


@pytest.fixture
def folder(tmp_path):
    cells = grid(base(), steps=(5, 6, 7, 8, 9))
    return made_up(tmp_path / "sweep", [(c, planned(c, params=1000 + i)) for i, c in enumerate(cells)])


@pytest.mark.fast
def test_states_are_those_of_the_records(folder, capsys):
    done, diverged, killed, failed, waiting = folder.cells
    ran(folder, done, loss=2.5)
    ran(folder, diverged, event="diverged", step=3, reason="Diverged: nan at step 3")
    ran(folder, killed, event="saved", step=4)
    folder.append("started", failed)
    folder.append("failed", failed, reason="the disk is full (exit code 5)")
    names = [state.name for state in folder.states().values()]
    assert names == ["complete", "diverged", "waiting", "failed", "waiting"]
    assert folders.ready(folder.cells, folder.states()) == [killed, failed, waiting]
    with lease(folder.claim(killed), taken):
        assert folder.states()[killed.hash].name == "running"

    assert slmjax("sweep", "status", folder.path).code == 0
    shown = slmjax("sweep", "status", folder.path).out
    for words in ("1 complete, 1 diverged, 2 waiting, 1 failed", "2.5000", "4/7", "nan at step 3", "the disk is full"):
        assert words in shown
    # 12 steps took 60 s where 10 s each had been expected: the others will be as slow.
    expected = 10 * (5 / 5 + 3 / 6 + 4 / 7)
    left = (10 * 3 / 7 + 10 + 10) * 60 / expected
    assert f"about {round(left // 60)} min {round(left % 60):02d} s of training left" in shown


@pytest.mark.fast
def test_a_run_that_was_killed_after_its_last_save_is_complete(folder):
    cell = folder.cells[0]
    ran(folder, cell, loss=2.5, event="started")
    assert folder.states()[cell.hash].name == "waiting"
    folder.append("complete", cell)
    assert folder.states()[cell.hash].loss == 2.5
    ran(folder, cell, loss=math.nan)
    assert folder.states()[cell.hash].name == "diverged"


@pytest.mark.fast
def test_results_are_a_table_that_fit_reads(tmp_path):
    pairs = [
        (c, planned(c, params=1000 * (1 + i // 2))) for i, c in enumerate(seeds(grid(base(), steps=(5, 6)), 2))
    ]  # fmt: skip
    held = Cell(experiment=base(steps=50), tags={"budget": 1e9})
    sweep = made_up(tmp_path / "s", [*pairs, (held, planned(held, params=9000, held_out=True))])
    for i, cell in enumerate(sweep.cells):
        ran(sweep, cell, loss=3.0 - 0.1 * i)
    ran(sweep, sweep.cells[1], event="diverged", step=2)
    runs = read_runs(sweep.write_results())
    assert len(runs) == 3
    assert runs.skipped == 2  # the one that diverged, and the one that is held out
    np.testing.assert_array_equal(runs["seed"], [0, 0, 1])
    np.testing.assert_array_equal(runs["params"], [1000, 2000, 2000])
    np.testing.assert_array_equal(runs["steps"], [5, 6, 6])
    np.testing.assert_allclose(runs["loss"], [3.0, 2.8, 2.7])
    assert runs.cells[1] == runs.cells[2] != runs.cells[0]
    assert len(set(runs["params_nonembedding"])) == 2


@pytest.mark.fast
def test_halving_drops_what_was_worse(tmp_path):
    pairs = [(c, planned(c)) for c in halving(grid(base(), seed=(0, 1, 2, 3)), (5, 10, 20), keep=0.5)]
    sweep = made_up(tmp_path / "s", pairs)
    first, second, third = (sweep.cells[4 * n : 4 * n + 4] for n in range(3))
    assert folders.ready(sweep.cells, sweep.states()) == list(first)
    for cell, loss in zip(first, (3.0, 2.0, 1.0, 4.0), strict=True):
        ran(sweep, cell, loss=loss)
    states = sweep.states()
    assert [states[c.hash].name for c in second] == ["dropped", "waiting", "waiting", "dropped"]
    assert folders.ready(sweep.cells, states) == [second[1], second[2]]
    ran(sweep, second[1], loss=1.5)
    ran(sweep, second[2], event="diverged", step=2)
    states = sweep.states()
    assert [states[c.hash].name for c in third] == ["dropped", "waiting", "dropped", "dropped"]


@pytest.mark.fast
def test_designs_that_cannot_identify_the_law():
    def cells(points):
        return [planned(Cell(experiment=base(seed=i)), params=n, tokens=d) for i, (n, d) in enumerate(points)]

    one_ratio = planning.design(cells([(n, 20 * n) for n in (1000, 2000, 4000, 8000, 16000, 32000)]))
    assert any("every run has the same tokens per parameter" in line for line in one_ratio)
    one_budget = planning.design(cells([(1000 * 2**i, 2**20 // 2**i) for i in range(6)]))
    assert any("all runs have one budget" in line for line in one_budget)
    two_sizes = planning.design(cells([(n, d) for n in (1000, 2000) for d in (10000, 20000, 40000)]))
    assert any("two values of params cannot tell a floor" in line for line in two_sizes)
    good = [(n, c / 6 / n) for c in (1e9, 1e10, 1e11) for n in (4000, 8000, 16000, 32000)]
    assert planning.design(cells([(n, round(d)) for n, d in good])) == []
    assert planning.design(cells([(1000, 20000)] * 3)) == []  # learning rates of one model are no such design


@pytest.mark.fast
def test_bad_folders(folder, tmp_path):
    other = grid(base(), steps=(11, 12))
    with pytest.raises(UserError, match="holds another sweep: 'made-up', of which 5 of 5 cells are not in 'other'"):
        made_up(folder.path, [(c, planned(c)) for c in other], name="other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no sweep's folder"):
        made_up(tmp_path / "full", [(c, planned(c)) for c in other])
    for verb in ("run", "status", "report"):
        refused = slmjax("sweep", verb, tmp_path / "full")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "not a sweep's folder (no sweep.json)" in refused.err
    for args, words in ((["plam"], "'plam' is none of them"), ([], "which?")):
        assert words in slmjax("sweep", *args).err
    for option, words in (
        ("--steps", "only --runtime... can be given"),
        ("--runtime.workdir", "every cell has its own folder"),
    ):
        refused = slmjax("sweep", "run", folder.path, "--", option, "3")
        assert refused.code == 2
        assert words in refused.err
    file = folder.config(folder.cells[0])
    changed = json.loads(file.read_text())
    changed["experiment"]["steps"] = 500
    file.write_text(json.dumps(changed))
    refused = slmjax("sweep", "run", folder.path)
    assert (refused.code, "has been changed since the plan" in refused.err) == (2, True)


@pytest.mark.fast
def test_cells_are_added_to_a_sweep(folder):
    cells = grid(base(), steps=(5, 6, 7, 8, 9, 10))
    more = made_up(folder.path, [(c, planned(c)) for c in cells])
    assert len(folders.read(folder.path).cells) == len(more.cells) == 6


@pytest.mark.fast
def test_the_command_of_a_cell(tmp_path):
    cell = Cell(experiment=base(), tags={"lr": 0.1, "long": "x" * 80})
    folder = made_up(tmp_path / "s", [(cell, planned(cell))])
    words = command(folder, folder.cells[0], ["--runtime.dtype", "float32"])
    assert words[1:5] == ["-m", "slmjax.cli.main", "train", str(folder.config(folder.cells[0]))]
    assert words[words.index("--runtime.tracking.group") + 1] == "made-up"
    tags = words[words.index("--runtime.tracking.tags") + 1 :][:2]
    assert tags[0] == "lr=0.1"
    assert len(tags[1]) == 64  # W&B takes no longer ones
    assert words[-2:] == ["--runtime.dtype", "float32"]


@pytest.mark.fast
def test_cells_of_one_shape_are_grouped(tmp_path):
    pairs = [(c, planned(c, shape="a", memory=1e9)) for c in seeds(base(), 6)]
    pairs += [(c, planned(c, shape="b", memory=1e9)) for c in grid(base(), steps=(5, 6))]
    held = Cell(experiment=base(steps=50))
    folder = made_up(tmp_path / "s", [*pairs, (held, planned(held, shape="a", held_out=True, memory=1e9))])
    cells = list(folder.cells)

    def sizes(most=None, workers=1, free=1e12, apart=()):
        return len(grouping.group(cells[0], cells, most=most, workers=workers, free=free, apart=apart))

    assert (sizes(), sizes(most=4), sizes(most=1), sizes(workers=2), sizes(workers=4)) == (6, 4, 1, 3, 2)
    assert (sizes(free=3.5e9), sizes(free=3.5e9, workers=2), sizes(free=1e8)) == (3, 1, 1)
    assert (sizes(apart={cells[3].hash}), sizes(apart={cells[0].hash})) == (5, 1)
    assert grouping.group(cells[6], cells[6:], most=None, workers=1, free=1e12, apart=()) == cells[6:8]
    assert grouping.group(cells[8], cells, most=None, workers=1, free=1e12, apart=()) == cells[8:]
    words = grouping.command(folder, cells[:2], ["--runtime.dtype", "float32"])
    assert words[3:] == [
        "sweep", "cells", str(folder.path), cells[0].hash, cells[1].hash, "--", "--runtime.dtype", "float32",
    ]  # fmt: skip

    grouping.refuse_too_many(folder, folder.states(), 1, 1e8)  # one at a time: the plan has looked at that
    with pytest.raises(UserError, match=r"^--workers is 8, but 8 cells at a time .* 5 GB are free; use --workers 3$"):
        grouping.refuse_too_many(folder, folder.states(), 8, 5e9)
    for cell in cells[:7]:
        ran(folder, cell)
    grouping.refuse_too_many(folder, folder.states(), 8, 5e9)


@pytest.mark.fast
def test_a_run_among_others_is_charged_its_share_of_the_time(folder):
    cell = folder.cells[0]
    ran(folder, cell, elapsed=20.0)
    assert folder.states()[cell.hash].seconds == 20
    rows = read(folder.run(cell) / "ledger.jsonl")
    text = b"".join(encode(row | ({"among": 4} if row["event"] == "started" else {})) for row in rows)
    (folder.run(cell) / "ledger.jsonl").write_bytes(text)
    assert folder.states()[cell.hash].seconds == 5


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--population", "0"], "--population is 0; expected at least 1"),
        (["--population", "3", "--no-populations"], "--no-populations trains each cell alone"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_mistakes_of_run(folder, options, words):
    ended = slmjax("sweep", "run", folder.path, *options)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert words in ended.err
    missing = slmjax("sweep", "cells", folder.path, "nothing")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "has no cell nothing" in missing.err


@pytest.mark.fast
def test_an_agent_of_wandb_trains_one_cell(tmp_path):
    """By wandb's own functions: what its agent runs is a command that trains one cell."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    cells, held = seeds(base(), 2), Cell(experiment=base(steps=50))
    folder = made_up(tmp_path / "s", [*((c, planned(c)) for c in cells), (held, planned(held, held_out=True))])
    wandb_sweep.write(folder, tmp_path / "sweep.yaml")
    config = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert (config["method"], config["metric"]["name"]) == ("grid", "validation/loss")
    assert config["parameters"] == {"cell": {"values": [cell.hash for cell in cells]}}
    given = create_sweep_command_args({"args": {"cell": {"value": cells[1].hash}}})
    words = [w for c in create_sweep_command(config["command"]) for w in given.get(c[2:-1], [c])]
    assert words == ["${env}", "slmjax", "sweep", "cells", str(folder.path), f"cell={cells[1].hash}"]
    (folder.config(folder.cells[1])).write_text("{}")
    ended = slmjax(*words[2:])
    assert "has been changed since the plan" in ended.err  # the cell was found: its file is what is wrong
    rounds = made_up(tmp_path / "r", [(c, planned(c)) for c in halving(cells, (5, 10))])
    with pytest.raises(UserError, match="rounds of successive halving"):
        wandb_sweep.write(rounds, tmp_path / "r.yaml")


@pytest.mark.fast
def test_nothing_left_to_run(folder):
    for cell in folder.cells:
        ran(folder, cell)
    said = []
    run(folder, say=said.append)
    assert said == []
    ended = [e["cell"] for e in folder.events() if e["event"] == "complete"]
    assert sorted(ended) == sorted(c.hash for c in folder.cells)  # noted, though another process had started them
    run(folder, say=said.append)
    assert len(folder.events()) == 5
    ran(folder, folder.cells[0], event="diverged", step=2)
    (folder.path / "ledger.jsonl").unlink()
    with pytest.raises(Diverged, match="4 of 5 cells complete, 1 diverged"):
        run(folder, say=said.append)


def test_a_sweep_may_go_by_the_coupled_law(tmp_path):
    plan, experiments = isoflops(tmp_path / "plain"), {}
    for cell in plan.cells:
        experiments[cell.hash] = folders.read_json(plan.config(cell))["experiment"]
    folders.save(replace(plan, path=tmp_path / "s", coupled=True), experiments)
    folder = folders.read(tmp_path / "s")
    assert folder.coupled
    assert not folders.read(tmp_path / "plain").coupled
    for cell in folder.cells[:-1]:
        ran(folder, cell, loss=noisy(cell))
    predicting.ahead(folder)
    last = folder.held_out
    found = json.loads((folder.path / predicting.FILE).read_text())[last.hash]
    assert "gamma" in found["parameters"]
    assert found["mean"]["value"] == pytest.approx(surface(last.params, last.tokens), rel=2e-3)
    assert "gamma" in narrowing.current(folder).draws.values


def test_the_held_out_run_is_predicted_first_and_then_compared(tmp_path):
    """On a surface with hardly any noise, so that the prediction is the law's value, which the page tells."""
    folder = isoflops(tmp_path / "s")
    last = folder.held_out
    for cell in folder.cells[:-1]:
        assert last not in folders.ready(folder.cells, folder.states())
        ran(folder, cell, loss=noisy(cell))
    assert folders.ready(folder.cells, folder.states()) == [last]

    assert "predicted loss" in predicting.ahead(folder)
    file = folder.path / predicting.FILE
    before = file.read_text()
    truth = surface(last.params, last.tokens)
    found = json.loads(before)[last.hash]
    assert found["mean"]["value"] == pytest.approx(truth, rel=2e-3)
    assert found["run"]["low"] < truth < found["run"]["high"]
    assert found["fitted_runs"] == 15
    assert found["line_without_floor"] < truth  # without a floor the loss falls for ever
    assert "actual" not in predicting.compared(folder)

    ran(folder, last, loss=truth * 1.0001)
    predicting.ahead(folder)
    assert file.read_text() == before  # what was predicted stays as it was
    compared = predicting.compared(folder)
    assert compared["inside"]
    assert compared["error"] == pytest.approx(found["mean"]["value"] / (truth * 1.0001) - 1)
    assert abs(compared["error"]) < abs(compared["error_of_line"])

    analysis = analyse(read_runs(folder.path / folders.RESULTS), Settings(draws=20))
    page = report.render(folder, folder.states(), analysis, "", [])
    for words in ("written", "inside the interval", "a: best N ~ C^a", "approach 2", "16 of 16", "(iv) 6 N"):
        assert words in page
    for words in ("without 1", "fitted to 10 runs, 5 predicted", "inside their 90% intervals"):
        assert words in page
    text = report.markdown(folder, folder.states(), analysis, "", [])
    tables = [part.splitlines() for part in re.split(r"\n\n", text) if part.startswith("|")]
    assert len(tables) == len(re.findall("<table>", page))
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)


def test_a_report_without_a_fit_says_why(folder):
    ran(folder, folder.cells[0])
    ran(folder, folder.cells[1], event="diverged", step=2, reason="Diverged: <nan>")
    done = slmjax("sweep", "report", folder.path, "--out", folder.path / "elsewhere")
    assert done.code == 0, done.err
    text = (folder.path / "elsewhere" / "report.md").read_text()
    assert "| no fit |" in text
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (folder.path / "elsewhere" / link).is_file()
    assert not (folder.path / "report.html").exists()
    done = slmjax("sweep", "report", folder.path)
    assert done.code == 0, done.err
    page = (folder.path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "no fit" in page
    assert "vary them" in page
    assert "Diverged: &lt;nan&gt;" in page
