"""The experiments on quantization run, with few steps on a little text, and write what they say."""

import csv
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import zstandard
from running import ROOT

from slmjax.compress.quant.budget import fraction, share
from slmjax.compress.quant.learned import SEQ
from slmjax.experiment_file import load_experiment, load_module
from slmjax.runs.carriers import sizes

FOLDER = ROOT / "experiments" / "quantize"


@pytest.fixture(scope="module")
def scripts(tiny, tmp_path_factory):
    """{name: module} of the experiments, whose text is a few chapters."""
    root = tmp_path_factory.mktemp("root")
    (root / "data" / "english_classics").mkdir(parents=True)
    (root / "data" / "recipes").symlink_to(ROOT / "data" / "recipes")
    packed = zstandard.ZstdCompressor().compress(tiny.text.read_bytes())
    for name in ("austen", "shakespeare", "moby_dick"):
        (root / "data" / "english_classics" / f"{name}.jsonl.zst").write_bytes(packed)
    modules = {name: load_module(FOLDER / f"{name}.py") for name in ("byte_model", "gaps", "ablation", "matrix")}
    modules["contest"] = load_module(FOLDER / "contest.py")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("byte_model", "contest"):
            patch.setattr(modules[name], "ROOT", root)
        patch.setattr(modules["byte_model"], "ROWS", 32)
        small = functools.partial(modules["byte_model"].model, width=32, heads=1, hidden=64, layers=1)
        patch.setattr(modules["byte_model"], "model", small)
        yield modules


@pytest.fixture(scope="module")
def rows(scripts, tmp_path_factory):
    """Of two ways, 8 steps."""
    gaps = scripts["gaps"]
    ways = {name: gaps.WAYS[name] for name in ("2 bits, SEQ", "2 bits, nearest, absmax")}
    return gaps.rows_of(0, tmp_path_factory.mktemp("gaps"), ways, steps=8)


def test_a_row_is_the_loss_above_full_precision(rows):
    full, trained, rounded = rows
    assert full.name == "full precision"
    assert full.gap == 0
    for row in (trained, rounded):
        assert row.gap == row.loss - full.loss
        assert row.gap != 0
    assert trained.averaged != trained.loss, "the average of 8 steps is not the last weights"
    assert math.isnan(rounded.averaged)


def seeds(gaps, names, rng):
    """Rows of 3 seeds with a gap that grows along the names."""
    for seed in range(3):
        full = 1.8 + rng.normal() / 10
        yield gaps.Row("full precision", seed, full, full + 0.001, 0.0, 0.001)
        for i, name in enumerate(names, start=1):
            gap = i / 100 + rng.normal() / 1000
            yield gaps.Row(name, seed, full + gap, full + gap, gap, gap)


def test_tables_have_paired_intervals_and_pictures(scripts, tmp_path):
    gaps = scripts["gaps"]
    names = ["2 bits, SEQ", "binary", "2 bits, GPTQ"]
    made = list(seeds(gaps, names, np.random.default_rng(0)))
    gaps.write(tmp_path, "gaps", "Gaps", made, {name: gaps.WAYS[name] for name in names}, "command")
    text = (tmp_path / "gaps.md").read_text()
    for name in names:
        values = [row.gap for row in made if row.name == name]
        low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert f": {name} | {np.mean(values):.4f} ± {(high - low) / 2:.4f} |" in text
    assert "| full precision |  | 0.0010 ± 0.0000 | " in text
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((tmp_path / "gaps.tsv").read_text().splitlines(), dialect="excel-tab"))
    assert len(table) == 3 * (1 + len(names))
    assert float(table[1]["gap"]) == pytest.approx(made[1].gap, abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True]),
        ({"2 bits, GPTQ": 0.1}, [False, True, True]),
        ({"2 bits, absmax": 0.05}, [True, False, True]),
        ({"3 bits, LSQ": 0.05}, [True, True, False]),
    ],
)
def test_what_is_to_hold_is_checked(scripts, changed, expected):
    gaps = scripts["gaps"]
    of = {8: 0.0, 4: 0.01, 3: 0.02, 2: 0.04, 1.58: 0.05, 1: 0.09}
    gap = {name: 0.3 if way.method else of[way.bits] for name, way in gaps.WAYS.items()}
    gap = gap | {"2 bits, absmax": 0.08} | changed
    made = [gaps.Row(name, 0, 1 + x, 1 + x, x, x) for name, x in gap.items()]
    assert [holds for _, holds in gaps.gates(made)] == expected


def test_the_ablation_compares_pairs(scripts, tmp_path):
    ablation = scripts["ablation"]
    made = []
    for seed in range(3):
        for decay in ablation.DECAYS:
            base = 1.8 + 0.3 * seed + (0.0 if decay else 0.02)
            made.append(ablation.Row("full precision", decay, seed, base, base))
            for name in ablation.QUANTIZERS:
                last = base + 0.05 + (0.001 * seed if decay else -0.04)
                made.append(ablation.Row(name, decay, seed, last, last + 0.01 + 0.001 * seed))
    changes = ablation.effects(made)["binary"]
    np.testing.assert_allclose(changes["average"], [0.01, 0.011, 0.012], atol=1e-12)
    np.testing.assert_allclose(changes["no decay"], [-0.02, -0.021, -0.022], atol=1e-12)
    np.testing.assert_allclose(changes["no decay, of the gap"], [-0.04, -0.041, -0.042], atol=1e-12)
    assert [ablation.verdict(changes[c]) for c in ("average", "no decay")] == ["worse", "better"]
    assert ablation.verdict(np.array([-0.01, 0.02, 0.0])) == ""
    ablation.write(tmp_path, made, "command")
    assert "| binary | +0.0110 ± 0.0025 worse |" in (tmp_path / "ablation.md").read_text()


def test_the_matrix_has_a_name_for_each_combination_that_a_format_holds(scripts):
    made = list(scripts["matrix"].experiments(seeds=2, only="2 bits, LSQ"))
    assert len({x.name for x in made}) == len(made) == 2 * 3
    assert "2 bits, LSQ, groups of 32, seed 1" in {x.name for x in made}
    assert sizes(made[0])
    assert made[0].seed == made[0].data.seed == 0
    assert made[1].seed == made[1].data.seed == 1


def test_an_artifact_is_packed_loaded_and_measured(scripts, tmp_path, monkeypatch, capsys):
    import slmjax
    from slmjax.config import Runtime, Tracking

    contest = scripts["contest"]
    monkeypatch.setattr(contest, "VOCAB", 300)
    monkeypatch.setattr(contest, "CANDIDATES", {contest.WINNER: contest.Candidate(SEQ(), 1)})
    value = contest.candidate(flops=1, width=128)
    assert value.steps == 4
    value = replace(value, data=replace(value.data, batch=8, length=64))
    runtime = Runtime(data_dir=str(tmp_path / "data"), tracking=Tracking(wandb="disabled"))
    run = slmjax.train(value, workdir=tmp_path / "run", runtime=runtime).folder
    for limit, code, said in ((1_000_000, 0, "pass"), (20_000, 1, "FAIL")):
        arguments = ["score", str(run), "--limit", str(limit), "--batches", "1"]
        assert contest.main(arguments) == code
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith(f"| {said} |")
    size = (run / "contest.tar.zst").stat().st_size
    assert bytes_of_codes(value) * 0.8 < size < bytes_of_codes(value) * 1.1 + 16_000, "the rest: scales, tokenizer"
    assert f"| {size:,} | {(FOLDER / 'contest.py').stat().st_size:,} |" in line
    assert 4 < float(line.split("|")[2].split()[0]) < 9, "bits a byte of a model that has hardly been trained"


def test_every_candidate_fits(scripts):
    """Without a tokenizer, and before compression."""
    contest = scripts["contest"]
    for name in contest.CANDIDATES:
        value = contest.candidate(name)
        assert 0.7 * contest.LIMIT < bytes_of_codes(value) < 1.25 * contest.LIMIT, name
    assert bytes_of_codes(contest.large()) < 16e6


def bytes_of_codes(experiment):
    """At the entropy of codes that are all equally frequent."""
    from slmjax import tree
    from slmjax.compress.quant.view import chosen
    from slmjax.models.assembly import is_declared

    declared = tree.flatten(experiment.model.declared(), is_leaf=is_declared)
    rules = chosen(experiment.model.axes(), experiment.view.rules)
    bits = sum(np.prod(declared[path].value.shape) * math.log2(q.grid.levels) for path, q in rules.items())
    return bits / 8


def test_the_share_is_that_of_the_law_where_it_applies(monkeypatch):
    assert share(100e6, 4e6, bits=2) == fraction(100e6, 4e6, bits=2) == math.exp(-6.7297 / math.log(100))
    assert share(99e6, 4e6, bits=2) == 0.25
    monkeypatch.chdir(ROOT)
    two_bits, _ = load_experiment(str(FOLDER / "two_bits.py"))
    assert two_bits.view.share == two_bits.schedule.decay_fraction == 0.25
    scratch, _ = load_experiment(f"{FOLDER / 'two_bits.py'}:from_scratch")
    assert scratch.view.over(scratch.steps).start == 0
