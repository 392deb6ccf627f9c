"""The HTML pages as a reader sees them, on a wide and on a narrow window, laid out by a real chromium.

It is installed with apt-get where it is missing, which needs root; CONTRIBUTING.md says how to leave these tests out.
"""

import shutil

import browser
import pytest
from running import slmjax
from sweeps.small_cells import isoflops, noisy, ran

from slmjax.sweeps import predicting, report
from slmjax.track.comparison import Entry, write

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tiny_run, tmp_path_factory):
    """The page of a run, of a comparison, of a finished sweep and of one that has hardly begun."""
    browser.install()
    at = tmp_path_factory.mktemp("pages")
    shutil.copy(tiny_run / "report.html", at / "run.html")
    rows = [{"step": s, "elapsed": 6.0 * s, "tokens": 1e3 * s, "validation/loss": 2 + 1 / s} for s in (1, 9)]
    same = {"name": "a name of many words that a narrow window has to break", "steps": 9}
    entries = [Entry(f"runs/{i}", {**same, "seed": i}, rows, 1e6, sizes={"GGUF": 4000 + i}) for i in range(3)]
    write(at / "comparison.html", [*entries, Entry("runs/b", {"name": "other", "steps": 9}, rows[:1], 1e6)])
    done, begun = isoflops(at / "sweep"), isoflops(at / "begun")
    for cell in done.cells[:-1]:
        ran(done, cell, loss=noisy(cell))
    predicting.ahead(done)
    ran(done, done.held_out, loss=noisy(done.held_out))
    ran(begun, begun.cells[0], event="diverged", step=2, reason="Diverged: " + "a reason without end " * 20)
    shutil.copy(report.write(done)[0], at / "sweep.html")
    assert slmjax("sweep", "report", begun.path).code == 0
    shutil.copy(begun.path / "report.html", at / "begun.html")
    return at


@pytest.mark.parametrize("width", [1280, 520])
@pytest.mark.parametrize("name", ["run", "comparison", "sweep", "begun"])
def test_nothing_is_cut_off_or_on_top_of_another(pages, name, width):
    seen = browser.look(pages / f"{name}.html", width=width)
    assert seen.width == width
    assert seen.content <= width, "the page is wider than the window"
    assert not seen.broken
    assert not seen.outside
    assert not seen.overlapping
    assert not seen.cut
    assert not seen.beyond
    assert all(seen.cards.values())


def test_what_a_reader_looks_for_is_there(pages):
    run, sweep = (browser.look(pages / f"{name}.html", width=1280) for name in ("run", "sweep"))
    assert run.charts >= 3
    assert "validation loss" in run.cards
    assert sweep.images == 5
    assert sweep.cards["cells complete"] == "16 of 16"
    assert {"Held-out run", "The law", "Cells"} <= set(sweep.titles)


def test_it_follows_light_and_dark(pages):
    def luminance(colour):
        red, green, blue = (int(part) / 255 for part in colour[4:-1].split(","))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    looks = [browser.look(pages / "run.html", width=1280, dark=dark).colours for dark in (False, True)]
    (ink, paper), (light_ink, dark_paper) = ([luminance(colour) for colour in colours] for colours in looks)
    assert (paper + 0.05) / (ink + 0.05) > 7, "the contrast that WCAG 2.1 asks for at its level AAA"
    assert (light_ink + 0.05) / (dark_paper + 0.05) > 7
