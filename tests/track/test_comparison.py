"""The page that compares runs: groups of seeds, names, means with intervals; it needs nothing from elsewhere."""

import math
import re
import xml.etree.ElementTree

import numpy as np
import pytest
import scipy.stats

from slmjax.errors import StorageError
from slmjax.estimate import half_width, mean
from slmjax.track.comparison import Entry, grouped, render, write

pytestmark = pytest.mark.fast


def experiment(seed=0, **view):
    return {"name": "bytes", "seed": seed, "view": view, "steps": 100, "data": {"batch": 8, "seed": seed}}


def rows(loss):
    return [
        {"step": s, "elapsed": 6.0 * s, "tokens": 1024.0 * s, "loss": 9.0, "validation/loss": loss + 1 / s}
        for s in (1, 10, 100)
    ]


SEQ = {"$type": "slmjax.compress.quant.learned:SEQ", "levels": 4}
LSQ = {"$type": "slmjax.compress.quant.learned:LSQ", "bits": 2}
ENTRIES = [
    *(Entry(f"runs/a{s}", experiment(s, of=SEQ), rows(2 + s / 10), 1e6, sizes={"GGUF": 4000}) for s in range(3)),
    Entry("runs/b", experiment(0, of=LSQ), rows(2.5), 1e6, sizes={"GGUF": 5000}),
    Entry("packed", {"name": "packed", "method": "rtn"}, sizes={"GGUF": 3000}, loss=3.25),
]


def test_means_and_intervals_are_those_of_student():
    values = np.random.default_rng(0).normal(3, 0.2, 5)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert half_width(values, 0.9) == pytest.approx((high - low) / 2)
    assert mean(values).se == pytest.approx(scipy.stats.sem(values))
    assert half_width([1.0, 3.0]) == pytest.approx(12.706204736432095)  # tan(0.475 pi), Cauchy
    assert math.isnan(half_width([1.0]))
    assert math.isnan(mean([1.0]).se)


def test_what_differs_in_its_seed_alone_is_one_group():
    groups = grouped(ENTRIES)
    assert [len(group.entries) for group in groups] == [3, 1, 1]
    assert groups[0].losses("validation/loss") == pytest.approx([2.01, 2.11, 2.21])
    assert groups[2].losses("validation/loss") == [3.25]


def test_groups_of_one_name_are_called_by_what_differs():
    assert [group.name for group in grouped(ENTRIES[:4])] == ["SEQ", "LSQ"]
    other = [Entry("x", {"name": "x"}), Entry("y", {"name": "y", "steps": 2})]
    assert [group.name for group in grouped(other)] == ["x", "y"]


def test_the_page_says_losses_with_intervals_and_draws_every_axis():
    page = render(ENTRIES)
    around = half_width([2.01, 2.11, 2.21])
    assert f"<td>2.1100 ± {around:.4f}</td>" in page
    assert "<td>3.2500</td>" in page
    for axis in ("tokens", "training FLOPs", "wall-clock time", "bytes: GGUF"):
        assert f"Loss against {axis}" in page
    assert "<td>1.02e+11</td>" in page, "102,400 tokens of 1e6 FLOPs"
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
        assert "nan" not in svg
    assert len(re.findall(r"<circle", page.split("Loss against bytes: GGUF<")[1])) == 3
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|url\(|https?:", page)


def test_curves_are_means_over_seeds_at_each_step():
    svg = re.findall(r"<svg.*?</svg>", render(ENTRIES[:3]), re.DOTALL)[0]
    label = re.search(r'aria-label="([^"]*)"', svg)
    assert label
    assert label[1] == "Loss against tokens: 1 bytes ends at 2.11"
    assert 'class="band s0"' in svg


def test_a_run_without_evaluation_is_compared_by_its_training_loss(tmp_path):
    unevaluated = Entry("c", {"name": "c"}, [{"step": 1, "elapsed": 1.0, "tokens": 10.0, "loss": 4.5}])
    page = write(tmp_path / "new" / "page.html", [*ENTRIES, unevaluated]).read_text()
    assert "training loss (not every run was evaluated)" in page
    assert "<td>4.5000</td>" in page
    with pytest.raises(StorageError, match="no run"):
        render([])
