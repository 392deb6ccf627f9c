"""`slmjax fit` on published runs and on small tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from running import slmjax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scaling"))
from published_runs import PUBLISHED, SURFACE, isoflop, surface

pytestmark = pytest.mark.fast

CHINCHILLA = (PUBLISHED / "chinchilla.csv", "--drop-highest", 5)


def written(path, runs):
    rows = zip(*runs.columns.values(), strict=True)
    path.write_text("\n".join([",".join(runs.columns), *(",".join(map(repr, map(float, row))) for row in rows)]) + "\n")
    return path


@pytest.fixture
def budgets(tmp_path):
    return written(tmp_path / "runs.csv", isoflop(noise=0.003, points=7))


def test_everything_about_a_published_table(tmp_path):
    asked = ("--predict", "params=70e9,tokens=1.4e12", "--flops", "5.76e23", "--hold-out", "3e20", "--draws", "40")
    done = slmjax("fit", *CHINCHILLA, *asked, "--out", tmp_path / "fit", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["runs"] == 240
    assert record["objective"] == pytest.approx(0.0010182740178)
    alpha = record["parameters"]["alpha"]
    assert alpha["low"] < 0.3478 < alpha["high"]
    assert alpha["se"] == pytest.approx(0.0147, rel=0.5)
    assert record["profiles"]["E"]["low"] < 1.8172 < record["profiles"]["E"]["high"]
    assert record["best"]["params"]["value"] == pytest.approx(73e9, rel=0.02)  # Chinchilla has 70e9
    assert record["predictions"][0]["run"]["low"] < record["predictions"][0]["mean"]["value"]
    assert record["held_out"]["predicted"] == 63
    assert "spread without gaps" in record["approaches"]["2"]
    kept = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert kept["parameters"] == record["parameters"]
    pictures = {Path(file).name for file in record["written"]}
    assert pictures == {"fit.json", "loss.png", "residuals.png", "profiles.png"}
    assert all((tmp_path / "fit" / name).stat().st_size > 1000 for name in pictures)


def test_the_page_has_intervals_verdicts_and_a_next_step(budgets, tmp_path):
    done = slmjax("fit", budgets, "--draws", "8", "--out", tmp_path / "fit", "--flops", "1e22")
    assert done.code == 0, done.err
    for words in (
        "L = E + A/N^alpha + B/D^beta",
        "90%, profile",
        "of a surface without noise",
        "best for 1e+22",
        "next:",
    ):
        assert words in " ".join(done.out.split()), words
    assert (tmp_path / "fit" / "isoflop.png").is_file()
    two = slmjax("fit", budgets, "--approach", "2", "--draws", "4", "--flops", "1e22")
    assert two.code == 0, two.err
    assert two.out.count("best params") == 5
    n = np.geomspace(1e6, 1e9, 8)
    rows = "".join(f"{x},{20 * x},{surface(SURFACE, x, 20 * x)}\n" for x in n)
    one = tmp_path / "one.csv"
    one.write_text("params,tokens,loss\n" + rows)
    told = slmjax("fit", one, "--draws", "2", "--flops", "1e22")
    assert told.code == 0, told.err
    assert "not identified" in told.out
    assert "vary tokens at each size" in " ".join(told.out.split("next:")[1].split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predict", "params=many"), "expected positive numbers by name"),
        (("--predict", "params=1e9"), "tokens is not given; the law needs params, tokens"),
        (("--predict", "params=1e9,tokens=1e9,bits=2"), "the law knows no bits"),
        (("--size-bytes", "1e6"), "limits of a run of --flops"),
        (("--delta", "0"), "--delta is 0.0; expected a positive number"),
        (("--level", "2"), "level: 2.0 is not between 0 and 1"),
        (("--draws", "1"), "draws: 1; give at least 2"),
        (("--terms", "precision"), "needs a column bits"),
        (("--terms", "repetition"), "needs a column unique_tokens"),
        (("--approach", "2", "--predict", "params=1e9,tokens=1e9"), "has no law of the loss"),
        (("--approach", "1"), "approach 1 needs at least 3 sizes"),
        (("--hold-out", "1e30"), "leave 35 runs to fit and 0 to predict"),
        (("--flops", "1e20", "--bits", "2", "4"), "knows nothing of bits"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_mistakes_are_one_line(budgets, flags, message):
    done = slmjax("fit", budgets, *(() if "--draws" in flags or "--approach" in flags else ("--draws", "2")), *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not done.out


def test_a_table_that_is_none(tmp_path):
    done = slmjax("fit", tmp_path / "missing.csv")
    assert done.code == 5
    assert "missing.csv" in done.err
    file = tmp_path / "runs.csv"
    file.write_text("params,loss\n1,2\n")
    assert slmjax("fit", file).code == 4


def test_a_score_follows_from_the_predicted_loss(tmp_path):
    runs = isoflop(noise=0.003, points=7)
    score = 0.25 + 0.65 / (1 + np.exp(4 * (runs["loss"] - 2.4)))
    table = written(tmp_path / "runs.csv", type(runs)({**runs.columns, "metric": score}))
    asked = ("fit", table, "--draws", "40", "--predict", "params=1e9,tokens=2e10", "--chance", "0.25")
    done = slmjax(*asked, "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["predictions"]
    truth = 0.25 + 0.65 / (1 + np.exp(4 * (surface(SURFACE, 1e9, 2e10) - 2.4)))
    assert found["score"]["value"] == pytest.approx(truth, abs=0.01)
    assert found["score"]["low"] < found["score"]["value"] < found["score"]["high"]
    assert "score there: 0." in slmjax(*asked).out
    for words, wrong in (("no column metric", [CHINCHILLA[0]]), ("give it with --predict", [table, "--predict"])):
        given = [*wrong, "--chance", "0.25", *(["--predict", "params=1e9,tokens=2e10"] if len(wrong) == 1 else [])]
        refused = slmjax("fit", *given, "--draws", "2")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert words in refused.err


def test_students_of_a_teacher(tmp_path):
    """Students whose losses follow from a teacher's: the law predicts another one."""
    runs = isoflop(points=5)
    alone = written(tmp_path / "alone.csv", runs)
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7.5, 9.5, 60), 10 ** rng.uniform(9, 11, 60)

    def loss(n, d, teacher):
        near = (1 + (teacher / (1.3 * surface(SURFACE, n, d))) ** (1 / 0.12)) ** (-1.5 * 0.12)
        return teacher + teacher**-0.6 * near * (700 / n**0.36 + 900 / d**0.33) ** 0.7

    teacher = rng.uniform(2.0, 3.2, 60)
    columns = {"params": n, "tokens": d, "teacher_loss": teacher, "loss": loss(n, d, teacher)}
    students = written(tmp_path / "students.csv", type(runs)(columns))
    asked = ("fit", students, "--supervised", alone, "--draws", "4")
    done = slmjax(*asked, "--predict", "params=3e8,tokens=1e10,teacher_loss=2.5", "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["predictions"]
    assert found["mean"]["value"] == pytest.approx(loss(3e8, 1e10, 2.5), rel=1e-3)
    for words, wrong in (
        ("teacher_loss is not given", [*asked, "--predict", "params=3e8,tokens=1e10"]),
        ("has no column teacher_loss", ["fit", alone, "--supervised", alone]),
        ("--flops: the law of students", [*asked, "--flops", "1e20"]),
    ):
        refused = slmjax(*wrong)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert words in refused.err


def test_the_end_of_another_schedule(tmp_path):
    """Published curves, thinned: two predict a third, and half of the third its own end."""
    curves = []
    for name in ("cosine_24000", "wsdcon_9", "wsd_20000_24000"):
        lines = (PUBLISHED / f"multipower_25_{name}.csv").read_text().splitlines()
        file = tmp_path / f"{name}.csv"
        file.write_text("\n".join([lines[0], *lines[1::8]]) + "\n")
        curves.append(file)
    asked = ("fit", "curves", *curves[:2], "--of", curves[2], "--warmup", "2160")
    done = slmjax(*asked, "--hold-out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["of"]["mean_error"] < 0.005
    rows = [line.split(",") for line in curves[2].read_text().splitlines()]
    last = rows[0].index("loss")
    half = [row if i < len(rows) // 2 else [*row[:last], "", *row[last + 1 :]] for i, row in enumerate(rows)]
    curves[2].write_text("\n".join(map(",".join, half)) + "\n")
    shown = slmjax(*asked)
    assert shown.code == 0, shown.err
    predicted = float(shown.out.split(": loss ")[1].split()[0])
    assert predicted == pytest.approx(float(rows[-1][last]), rel=0.01)
    refused = slmjax("fit", "curves", tmp_path / "none", "--of", curves[2])
    assert (refused.code, "no such run folder or CSV file" in refused.err) == (2, True)
