"""The report: what it says, that it needs nothing but the run's files, escapes, and stays small for long runs."""

import html.parser
import json
import math
import re
import shutil
import xml.etree.ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slmjax.errors import StorageError
from slmjax.track import report
from slmjax.track.chart import POINTS, Series, chart, downsample, label, ticks
from slmjax.track.jsonl import encode
from slmjax.track.report import Report, write

pytestmark = pytest.mark.fast

CONFIG = {
    "slmjax": "0.1",
    "fingerprint": "0123456789abcdef" * 4,
    "stores": [{"name": "english", "location": "file:///stores/english/", "fingerprint": "fe" * 32}],
    "experiment": {
        "$type": "slmjax.config:Experiment", "name": "my <run> & more", "steps": 100,
        "optimizer": {"$type": "slmjax.optim.recipes:AdamW", "b1": 0.9}, "data": {"$type": "x:Data", "batch": 16},
    },
}  # fmt: skip
ENERGY = {
    "kwh": 0.5, "it_kwh": 0.4, "pue": 1.25, "method": "tdp-estimate", "estimate": True, "seconds": 3725.0,
    "parts": {"cpu": {"kwh": 0.4, "method": "tdp-estimate", "detail": "assumed 4 W"}}, "co2e_kg": 0.2375,
    "grid": {"g_per_kwh": 475.0, "zone": "world average", "year": 2019, "source": "IEA"},
}  # fmt: skip


def rows(steps):
    for step in range(1, steps + 1):
        row = {
            "step": step, "elapsed": step * 0.5, "time": 1e9 + step, "loss": 2 + 8 / step, "lr": 1e-3, "grad_norm": 1.0,
            "tokens": step * 4096, "tokens_per_second": 8192.0, "mfu": 0.25, "memory_bytes": 2**30,
        }  # fmt: skip
        if step % 50 == 0:
            row |= {"validation/loss": 2.5 - step / 1000, "validation/perplexity": 12.0, "validation/loss_se": 0.0123}
        yield row


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "environment.json").write_text(json.dumps({"command": "slmjax train <x>", "devices": ["cpu: cpu"] * 8}))
    (tmp_path / "energy.json").write_text(json.dumps(ENERGY))
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, rows(100))))
    events = [{"event": "created"}, {"event": "started"}, {"event": "complete"}]
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(encode({"time": 1.7e9, "attempt": 1, **e}) for e in events))
    return tmp_path


class Page(html.parser.HTMLParser):
    """Visible text, tags, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.words, self.open, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(folder):
    page = Page(write(folder).read_text())
    assert page.open == []
    return page, " | ".join(page.words)


def test_it_says_what_matters(run):
    page, text = page_of(run)
    for wanted in (
        "my <run> & more", "complete", "0123456789ab", "validation loss | 2.400", "best 2.400 at 100", "410 k",
        "8.19 k", "median; MFU 25.0%", "50 s", "peak memory 1.00 GiB", "0.5 kWh", "estimate; 2.4e+02 g CO2e",
        "an estimate, not a measurement", "475 gCO2e/kWh, world average 2019 (IEA)", "AdamW(b1=0.9)", "8 × cpu: cpu",
        "slmjax train <x>", "Gradient norm, before clipping", "Learning rate", "Tokens a second",
        "english | file:///stores/english/, fingerprint fefefefefefe", "2.4000 ± 0.0123 (best)",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_it_needs_no_network_and_no_script(run):
    text = write(run).read_text()
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|url\(|https?:", text)


def test_it_follows_light_and_dark(run):
    text = write(run).read_text()
    assert "prefers-color-scheme: dark" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(", svg)
        xml.etree.ElementTree.fromstring(svg)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "ledger.jsonl", "environment.json", "energy.json"])
def test_it_can_be_made_at_any_time(run, missing):
    (run / missing).unlink()
    assert "my <run> & more" in page_of(run)[1]


def test_it_can_be_made_elsewhere_with_the_same_content(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    made = re.compile("report made .* UTC")
    assert made.sub("", write(run).read_text()) == made.sub("", write(tmp_path / "moved").read_text())


def test_a_torn_metrics_file_of_a_running_run(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 101, "lo')
    assert "of 100" in page_of(run)[1]


def test_a_loss_of_nan_is_left_out_of_the_picture(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(encode({"step": 101, "elapsed": 60.0, "time": 1e9, "loss": math.nan, "grad_norm": math.inf}))
    page, text = page_of(run)
    assert not [a for _, a in page.tags if "nan" in a.get("d", "") or "inf" in a.get("d", "")]
    assert "nan" in text  # the card says it


def test_it_stays_small_however_long_the_run(run):
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode, rows(50_000))))
    assert write(run).stat().st_size < 120_000


def test_no_run(tmp_path):
    with pytest.raises(StorageError, match=r"holds no run \(no config\.json\)"):
        write(tmp_path)


def test_as_a_tracker_it_never_stops_a_run(run, monkeypatch):
    said = []
    Report(run, say=said.append).finish("complete")
    assert (run / "report.html").is_file()

    def broken(folder):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(report, "render", broken)
    Report(run, say=said.append).finish("complete")
    assert said == ["report.html is not written: oops"]


def test_as_a_tracker_it_is_remade_now_and_then(run, monkeypatch):
    tracker = Report(run, every=0.0)
    tracker.log(1, {})
    tracker._thread.join()
    assert (run / "report.html").is_file()


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=2000), st.integers(1, 300))
def test_downsampling_keeps_mean_extremes_and_order(points, count):
    pairs = [(float(i), y) for i, (_, y) in enumerate(points)]
    finite = [y for _, y in pairs if math.isfinite(y) and abs(y) < 1e150]
    pairs = [(x, y if math.isfinite(y) and abs(y) < 1e150 else math.nan) for x, y in pairs]
    buckets = downsample([x for x, _ in pairs], [y for _, y in pairs], count)
    assert len(buckets) <= count
    assert [b.x for b in buckets] == sorted(b.x for b in buckets)
    if finite:
        assert min(b.low for b in buckets) == min(finite)
        assert max(b.high for b in buckets) == max(finite)
        assert all(b.low <= b.mean * (1 + 1e-9) + 1e-300 or b.low <= b.mean + abs(b.low) * 1e-9 for b in buckets)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@example(879609.9999999999, 1e-6)
def test_ticks_are_few_and_inside(low, span):
    found = ticks(low, low + span)
    assert len(found) <= 12
    slack = 1e-6 * span + 4 * math.ulp(abs(low) + span)  # far from zero, floats are farther apart than that span's part
    assert all(low - slack <= t <= low + span + slack for t in found)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.002, "0.002"), (0.0005, "5e-4"), (3.5, "3.5"), (12000, "12 k"), (2.5e6, "2.5 M")]
)
def test_labels(value, text):
    assert label(value) == text


def test_a_chart_without_data_and_one_with_a_single_point():
    assert "no data yet" in chart("Loss", [Series("training", [], [])])
    assert "<circle" in chart("Loss", [Series("training", [1.0], [2.0])])
    assert "a &lt; b" in chart("a < b", [Series("x", [1.0], [2.0])])
    assert POINTS <= 400
