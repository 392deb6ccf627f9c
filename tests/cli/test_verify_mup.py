"""`slmjax verify mup`: a small run of it, its verdicts on invented measurements, mistakes."""

import csv
import math
from dataclasses import replace

import pytest
from running import slmjax

from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.models.resizing import resized
from slmjax.runs import mup_check
from slmjax.runs.mup_check import Coordinates, Measured, Plan, verdicts

PLAN = Plan(widths=(32, 64, 128), depths=(2, 8), rates=(0.01, 0.02, 0.04), steps=10, few=2)


def invented(plan, size=0.0, change=0.0, best=lambda size: 1):
    """Activations that grow with these powers of width times layers; losses that are least at the index `best`."""
    coordinates, losses = {}, {}
    for at in plan.sizes:
        grown = at.width * at.layers
        coordinates[at] = Coordinates({"q": grown**size, "v": 1.0}, {"q": grown**change, "v": 1.0})
        losses[at] = tuple(1.0 + abs(i - best(at)) for i in range(len(plan.rates)))
    return Measured(coordinates, losses)


def test_what_is_flat_and_transfers():
    wide, deep = verdicts("muP", invented(PLAN, size=-0.2, change=0.1), PLAN, tolerance=0.35)
    assert (wide.axis, deep.axis) == ("width", "layers")
    assert wide.slopes["q"] == pytest.approx((-0.2, 0.1))
    assert [v.flat and v.transfers for v in (wide, deep)] == [True, True]
    assert not wide.at_edge


@pytest.mark.parametrize(("size", "change"), [(0.5, 0.0), (0.0, 1.0), (0.0, -0.5)])
def test_what_grows_or_stands_still_is_named(size, change):
    wide, _ = verdicts("SP", invented(PLAN, size, change), PLAN, tolerance=0.35)
    assert wide.uneven == ["q"]


def test_the_best_rate_may_move_by_one_step():
    one, _ = verdicts("muP", invented(PLAN, best=lambda s: 1 if s.width == 32 else 2), PLAN, tolerance=0.35)
    two, deep = verdicts("SP", invented(PLAN, best=lambda s: 2 if s.width == 32 else 0), PLAN, tolerance=0.35)
    assert (one.moved, one.transfers) == (1, True)
    assert (two.moved, two.transfers, two.at_edge) == (2, False, True)
    assert deep.moved == 0
    diverged = invented(PLAN)
    diverged.losses[PLAN.sizes[1]] = (math.inf,) * 3
    assert not verdicts("SP", diverged, PLAN, tolerance=0.35)[0].transfers


def test_sizes_that_grow_with_the_width():
    model = llama(layers=2, width=32, heads=4, kv_heads=2, hidden=88, vocab=61, context=32)
    wide = resized(model, width=128, layers=6)
    block = wide.pattern[0]
    assert (wide.width, wide.layers, block.mlp.hidden) == (128, 6, 352)
    assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim) == (16, 8, 8)
    assert resized(wide, width=32, layers=2) == model
    assert resized(model, width=8, layers=1).pattern[0].mixer.heads == 2


def table(file):
    return list(csv.DictReader(file.read_text().splitlines(), delimiter="\t"))


def test_a_small_run(tiny, tmp_path, monkeypatch):
    out = tmp_path / "mup"
    command = ("verify", "mup", tiny.file, "--widths", "16", "32", "--depths", "1", "--rates", "3", "--steps", "5")
    command = (*command, "--few", "2", "--tolerance", "3", "--no-control", "--out", out)
    overrides = ("--", "--runtime.data-dir", tiny.data_dir, "--data.batch", "4")
    done = slmjax(*command, *overrides)
    assert done.code == 0, done.err
    assert "CompleteP, width 16 32:" in done.out
    assert "best learning rate" in done.out
    rows = table(out / "coordinates.tsv")
    names = {row["activation"] for row in rows}
    assert {"embedding", "layers/attn/q", "layers/attn/o", "layers/mlp/down", "stream", "logits"} <= names
    assert all(float(row["change"]) > 0 for row in rows)
    rates = table(out / "learning_rates.tsv")
    assert len(rates) == 2 * 3
    assert {float(row["peak_lr"]) for row in rates} == {0.005, 0.01, 0.02}  # the experiment's, and a factor around it
    for name in ("coordinates.png", "learning_rates.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"

    again = slmjax(*command, *overrides)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "is not empty; give another folder" in again.err

    def growing(base, parametrisation, plan, *rest):
        return invented(plan, change=1.0)

    monkeypatch.setattr(mup_check, "measure", growing)
    failed = slmjax(*command[:-3], "--out", tmp_path / "failed", "--tolerance", "0.3", *overrides)
    assert (failed.code, failed.err.count("\n")) == (5, 1)
    assert "CompleteP fails along width: q not flat" in failed.err
    assert "SP (control)" in failed.out


def test_mistakes(tiny, tmp_path):
    for words, message in (
        (["--rates", "4"], "--rates is 4; expected an odd number"),
        (["--few", "0"], "--few is 0; expected 1 to --steps"),
        (["--widths", "64", "32"], "--widths 64 32: expected ascending"),
    ):
        refused = slmjax("verify", "mup", tiny.file, *words, "--out", tmp_path / "x")
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert message in refused.err
    shown = slmjax("verify", "mup", "--help")
    assert shown.code == 0
    assert "slmjax verify mup experiments/scaling/mup_transfer.py" in shown.out
    assert "verify mup" in slmjax("verify", "--help").out
    assert "expected `resume` or `mup`" in slmjax("verify", "mpu").err
    pair = llama(layers=2, width=32, heads=4, kv_heads=2, hidden=88, vocab=61, context=32)
    with pytest.raises(UserError, match="layers: 3 is no multiple of the 2 layers"):
        resized(replace(pair, pattern=pair.pattern * 2, repeats=1), width=32, layers=3)
