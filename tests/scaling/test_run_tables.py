"""Tables of runs: what is read, and what is refused in one line."""

import numpy as np
import pytest
from published_runs import PUBLISHED

from slmjax.errors import DataError, UserError
from slmjax.scaling.runs import drop_highest, read, table

pytestmark = pytest.mark.fast

HEADER = "params,tokens,loss\n"


def written(tmp_path, text, name="runs.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_names_of_others_are_understood_and_the_third_column_follows(tmp_path):
    runs = read(PUBLISHED / "chinchilla.csv")
    assert len(runs) == 245
    assert runs["tokens"] == pytest.approx(runs["flops"] / 6 / runs["params"])
    assert runs.cost == pytest.approx(6.0)
    assert "hex_color" not in runs.columns
    other = read(written(tmp_path, "N\tC\tFinal Loss\n1e6\t6e13\t4.0\n\n2e6\t6e13\t3.9\n", "runs.tsv"))
    assert other["tokens"] == pytest.approx([1e7, 5e6])
    assert table({"tokens": [1e7], "flops": [6e13], "loss": [3.0]})["params"] == pytest.approx([1e6])


def test_optional_columns_seeds_and_runs_that_diverged(tmp_path):
    text = "params,tokens,loss,seed,bits,unique_tokens,status,note\n"
    text += "1e6,1e7,4.0,1,,,done,a\n1e6,1e7,4.1,2,2,5e6,done,b\n2e6,1e7,nan,1,2,,diverged,c\n"
    runs = read(written(tmp_path, text))
    assert (len(runs), runs.skipped) == (2, 1)
    assert list(runs["bits"]) == [16, 2]
    assert list(runs["unique_tokens"]) == [1e7, 5e6]
    assert runs.repeats
    assert "note" not in runs.columns
    assert runs.varies("bits")
    assert not runs.varies("params")
    twice = table({"params": [1e6, 1e6, 2e6], "tokens": [1e7] * 3, "loss": [4.0, 4.1, 3.9], "seed": [1, 2, 1]})
    assert list(twice.cells) == [0, 0, 1]
    assert not twice.repeats


def test_budgets_are_groups_of_equal_flops():
    assert [
        len(b) for b in table({"params": [1e6, 2e6, 4e6], "flops": [1e15, 1.1e15, 4e15], "loss": [4, 3, 2]}).budgets
    ] == [
        2,
        1,
    ]
    assert read(PUBLISHED / "chinchilla.csv").budgets == ()  # these runs' FLOPs are spread


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "no runs; expected a header"),
        ("", "no runs"),
        ("params,loss\n1,2\n", r"no column tokens; it has params, loss \(tokens may be called tokens, d,"),
        ("params,tokens\n1,2\n", "no column loss"),
        ("flops,loss\n1e9,2\n", "no column params or tokens"),
        (HEADER + "1e6,1e7,3.1\n1e6,2e7,nan\n", "line 3: loss is nan; .* remove the line, or give it a status"),
        (HEADER + "1e6,1e7,-3\n", "line 2: loss is -3; expected a finite number above 0"),
        (HEADER + "0,1e7,3\n", "line 2: params is 0;"),
        (HEADER + "1e6,1e7,inf\n", "line 2: loss is inf"),
        (HEADER + "1e6,many,3\n", "line 2: tokens is 'many'; expected a number"),
        (HEADER + "1e6,1e7\n", "line 2: 2 values; the header names 3 columns"),
        (HEADER + "1e6,1e7,3\n2e6,1e7,3\n1e6,1e7,3.1\n", "line 4: the same cell as line 2 .*add a column seed"),
        ("params,N,tokens,loss\n1,1,1,1\n", "the column params is there twice"),
    ],
)
def test_mistakes_in_a_table_are_one_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as raised:
        read(written(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_other_mistakes(tmp_path):
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "runs.csv")
    runs = read(PUBLISHED / "chinchilla.csv")
    assert drop_highest(runs, 5)["loss"].max() < np.sort(runs["loss"])[-5]
    with pytest.raises(UserError, match="245 runs of the highest loss cannot be dropped"):
        drop_highest(runs, 245)
