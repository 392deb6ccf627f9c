"""Cells, their hashes, and the functions that make them; nothing is computed."""

import itertools
import math
from dataclasses import replace

import pytest
from scipy.stats import qmc
from small_cells import BATCH, LENGTH, VOCAB, base

from slmjax.errors import UserError
from slmjax.models.flops import parameter_count
from slmjax.optim.schedules import Linear
from slmjax.serialise import fingerprint, to_json
from slmjax.sweeps.cells import Cell, Sweep, cells, load
from slmjax.sweeps.isoflop import LlamaShape, at_budget, isoflop
from slmjax.sweeps.making import LogUniform, Uniform, grid, halving, random, seeds, sobol

pytestmark = pytest.mark.fast


def test_a_cell_is_named_by_its_experiment_without_the_name():
    cell = Cell(experiment=base())
    described = to_json(base())
    del described["name"]
    assert cell.hash == fingerprint(described)[:16]
    assert Cell(experiment=base(name="other"), tags={"a": 1}).hash == cell.hash
    assert Cell(experiment=base(seed=1)).hash != cell.hash


def test_grids_compose():
    made = seeds(grid(base(), **{"schedule.peak_lr": (1e-3, 3e-3), "data.batch": (4, 8)}), 2)
    found = [(c.experiment.schedule.peak_lr, c.experiment.data.batch, c.experiment.seed) for c in made]
    assert found == [(lr, b, s) for lr in (1e-3, 3e-3) for b in (4, 8) for s in (0, 1)]
    assert all(c.experiment.data.seed == c.experiment.seed for c in made)
    assert dict(made[-1].tags) == {"schedule.peak_lr": 3e-3, "data.batch": 8, "seed": 1}
    assert len({c.hash for c in made}) == 8
    assert grid(base(), schedule=(Linear(peak_lr=1e-3),))[0].label == "schedule=Linear"


def test_points_of_ranges():
    ranges = {"schedule.peak_lr": LogUniform(1e-4, 1e-1), "steps": Uniform(5, 8), "data.batch": (2, 4)}
    for make in (random, sobol):
        made = make(base(), 12, 3, **ranges)
        assert [c.hash for c in made] == [c.hash for c in make(base(), 12, 3, **ranges)]
        assert {5, 6} < {c.experiment.steps for c in made} <= {5, 6, 7, 8}
        assert {c.experiment.data.batch for c in made} == {2, 4}
        assert all(1e-4 <= c.experiment.schedule.peak_lr <= 1e-1 for c in made)
    unit = qmc.Sobol(3, rng=3).random(16)[:12]
    for cell, (u, _, v) in zip(sobol(base(), 12, 3, **ranges), unit, strict=True):
        assert cell.experiment.schedule.peak_lr == pytest.approx(1e-4 * 1e3**u)
        assert cell.experiment.data.batch == (2 if v < 0.5 else 4)


def test_successive_halving_has_rounds():
    made = halving(grid(base(), seed=tuple(range(9))), steps=(5, 10, 20))
    rounds = [[c for c in made if c.rung.round == n] for n in range(3)]
    assert [len(r) for r in rounds] == [9, 9, 9]
    assert [r[0].rung.best for r in rounds] == [9, 3, 1]
    assert [r[0].experiment.steps for r in rounds] == [5, 10, 20]
    assert len({c.rung.candidate for c in made}) == 9


def closed_form(width):
    """(parameters, FLOPs a token) of the shape below: 6 (N without tables + V d) + 6 T d L, with the attention's own
    width."""
    layers, inner, hidden = max(1, round(width / 16)), 8 * max(1, round(width / 8)), max(8, 8 * round(width / 3))
    inside = layers * (4 * width * inner + 3 * width * hidden) + (2 * layers + 1) * width
    return VOCAB * width + inside, 6 * (inside + VOCAB * width) + 6 * LENGTH * inner * layers


def test_isoflop_is_the_arithmetic_of_a_llama():
    shape = LlamaShape(vocab=VOCAB, context=LENGTH, aspect=16, head_dim=8)
    made = isoflop(base(), (1e9, 1e10), (6e3, 3e4), shape, lambda e: replace(e, seed=e.steps))
    assert len(made) == 4
    counts = {closed_form(8 * n)[0]: 8 * n for n in range(1, 40)}
    for cell, (budget, size) in zip(made, itertools.product((1e9, 1e10), (6e3, 3e4)), strict=True):
        nearest = min(counts, key=lambda n: abs(math.log(n / size)))
        assert parameter_count(cell.experiment.model) == nearest
        assert dict(cell.tags) == {"budget": budget, "params": nearest}
        flops = closed_form(counts[nearest])[1]
        assert cell.experiment.steps == round(budget / (flops * LENGTH * BATCH))
        assert cell.experiment.seed == cell.experiment.steps
    assert [shape.wide(width).layers for width in (8, 32, 64)] == [1, 2, 4]
    assert [replace(shape, layers=3).wide(width).layers for width in (8, 32, 64)] == [3, 3, 3]


SHAPE = LlamaShape(vocab=VOCAB, context=LENGTH)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid(base(), **{"schedule.peek_lr": (1e-3,)}), "did you mean 'peak_lr'"),
        (lambda: grid(base(), steps=5), "steps is 5; expected a tuple"),
        (lambda: grid(base(), steps=(0.5,)), "steps: 0.5 is a float"),
        (lambda: grid([base(), "other"], steps=(5,)), "expected an Experiment or a Cell"),
        (lambda: random(base(), 3, steps=7), "steps is 7; expected Uniform"),
        (lambda: Uniform(2, 1), r"Uniform\(2, 1\)"),
        (lambda: LogUniform(0, 1), "must be positive"),
        (lambda: halving(base(), (10, 5)), "expected numbers that rise"),
        (lambda: halving(base(), (5, 10), keep=2), "keep is 2"),
        (lambda: at_budget(base(), 1e6), "expected at least 10: raise the budget"),
        (lambda: isoflop(base(), (1e9,), (1e4, 2e4), lambda size: base().model), "give the same model"),
        (lambda: isoflop(base(), (1e9,), {1e8: (1e4,)}, SHAPE), "the budget 1e\\+09 has no sizes"),
        (lambda: Sweep(name="s", cells=()), "has no cells"),
        (lambda: Sweep(name="a/b", cells=tuple(cells(base()))), "without /"),
        (lambda: Sweep(name="s", cells=tuple(cells([base(), base(name="b")]))), "the same experiment twice"),
        (lambda: Sweep(name="s", cells=(Cell(experiment=base()),), held_out=Cell(experiment=base())), "twice"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_file_may_yield_experiments(tmp_path):
    file = tmp_path / "yields_cells.py"
    start = "from small_cells import base\n\n"
    file.write_text(start + "def sweep():\n    yield base()\n    yield base(seed=1)\ndef wrong():\n    yield 1 / 0\n")
    made, source = load(str(file))
    assert (made.name, len(made.cells), source) == ("yields_cells", 2, file)
    with pytest.raises(UserError, match=r"yields_cells.py:wrong:7: ZeroDivisionError"):
        load(f"{file}:wrong")
    (tmp_path / "holds_none.py").write_text("def experiment():\n    pass\ndef sweep():\n    return 3\n")
    with pytest.raises(UserError, match="returned a int; expected a Sweep"):
        load(str(tmp_path / "holds_none.py"))
    (tmp_path / "without.py").write_text("def experiment():\n    pass\n")
    with pytest.raises(UserError, match=r"without.py: there is no function sweep\(\)"):
        load(str(tmp_path / "without.py"))
