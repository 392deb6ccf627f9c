"""Labelled text: what a file says is what a batch holds; mistakes are named by file, row and column."""

import csv
import dataclasses
import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmjax.data.labelled import LabelledText
from slmjax.data.labelled_files import examples, files_of
from slmjax.data.stream import ReadProcesses, Stream
from slmjax.data.tokenizer import BPE, Bytes, File, Tokenizer
from slmjax.errors import DataError, UserError

pytestmark = pytest.mark.fast

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)
WORDS = ["good", "bad", "film", "plot", "actor", "the", "a", "was", "dull", "great", "never", "again"]
SAME_FOLDER = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(count, seed=0):
    """Texts of 1 to 30 words with a label that follows from them."""
    rng = np.random.default_rng(seed)
    texts = [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 30))) for i in range(count)]
    return [(text, "pos" if text.count("o") % 2 else "neg") for text in texts]


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def spec(path, **fields):
    given = {"train": (str(path),), "tokenizer": Bytes(), "length": 64, "batch": 8, "held_out": 0.25}
    return LabelledText(**given | fields)


def read(path, text="text", label="label"):
    return [(row.text, row.label) for row in examples(path, text, label)]


@SAME_FOLDER
@given(ROWS)
def test_csv_round_trip(tmp_path, rows):
    """Quotes, commas, line ends of every kind and any letter: Python's own writer is the reference."""
    assert read(write_csv(tmp_path / "x.csv", rows)) == rows
    swapped = write_csv(tmp_path / "y.csv", [(1, b, a) for a, b in rows], ("id", "class", "body"))
    assert read(swapped, "body", "class") == rows


@SAME_FOLDER
@given(ROWS, st.booleans())
def test_jsonl_round_trip(tmp_path, rows, ascii_only):
    lines = "".join(json.dumps({"label": b, "text": a}, ensure_ascii=ascii_only) + "\n" for a, b in rows)
    raw = lines.encode()
    (tmp_path / "x.jsonl").write_bytes(raw)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(raw))
    assert all(read(tmp_path / name) == rows for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"))


def test_numbers_are_labels_and_parquet_is_read(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [10, 2]}), file)
    assert read(file) == [("a", "10"), ("b", "2")]
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 10}\n\n{"text": "b", "label": 2}\n')
    assert read(tmp_path / "x.jsonl") == [("a", "10"), ("b", "2")]
    (tmp_path / "bom.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"a,\r\n""b""",x\r\n\r\n')
    assert read(tmp_path / "bom.csv") == [('a,\r\n"b"', "x")]
    long = "x" * 200_000  # more than the csv module takes by itself
    limit = csv.field_size_limit()
    assert read(write_csv(tmp_path / "long.csv", [(long, "y")])) == [(long, "y")]
    assert csv.field_size_limit() == limit
    opened = spec(file, held_out=0.0).open(cache=tmp_path / "cache")
    assert opened.labels == ("2", "10")  # by value
    assert not opened.has_validation


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.csv", b"text,class\na,b\n", r"x.csv has no column 'label'; there are: text, class"),
        ("x.csv", b"text,label\na,b\nc\n", r"row 2 has 1 fields, but the header has 2"),
        ("x.csv", b"text,label\na,b,c\n", r"row 1 has 3 fields, but the header has 2"),
        ("x.csv", b"text,label\na,b\n\xff,b\n", r"row 2, column 'text' is not UTF-8"),
        ("x.csv", b"text,label\na,b\nc,\xff\n", r"row 2, column 'label' is not UTF-8"),
        ("x.csv", b'text,label\n"a"b,c\n', r"row 1: not CSV"),
        ("x.csv", b'text,label\n"a,c\n', r"row 1: not CSV"),
        ("x.csv", b"text,label\n  ,b\n", r"row 1, column 'text' is empty"),
        ("x.csv", b"text,label\na,\n", r"row 1, column 'label' is empty"),
        ("x.csv", b"", r"has no column 'text'; there are: none"),
        ("x.jsonl", b'{"text": "a"}\n', r"row 1 has no column 'label'; there are: text"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n', r"row 2, column 'text' holds a int"),
        ("x.jsonl", b'{"text": null, "label": 1}\n', r"row 1, column 'text' holds null"),
        ("x.jsonl", b'{"text": "a", "label": 0.5}\n', r"row 1, column 'label' holds 0.5; expected a label"),
        ("x.jsonl", b'{"text": "a", "label": true}\n', r"column 'label' holds True"),
        ("x.jsonl", b'{"text": "\\ud800", "label": 1}\n', r"row 1, column 'text' is not UTF-8"),
        ("x.jsonl", b'{"text": "\xff", "label": 1}\n', r"row 1: not JSON"),
        ("x.jsonl", b"[1]\n", r"expected a JSON object"),
        ("x.csv.gz", b"no gzip", r"cannot be decompressed"),
        ("x.parquet", b"no parquet", r"not a readable Parquet file"),
        ("x.txt", b"text", r"of an unknown format; expected .csv"),
    ],
)
def test_mistakes_in_a_file(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as found:
        read(tmp_path / name)
    assert "\n" not in str(found.value)
    assert name in str(found.value)


def test_a_batch_is_what_the_texts_say(tmp_path):
    rows = rows_of(60)
    data = spec(write_csv(tmp_path / "x.csv", rows))
    opened = data.open(cache=tmp_path / "cache")
    assert opened.labels == ("neg", "pos")
    stream = opened.training()
    count = round(1 / (opened.epochs(1)))
    seen = {}
    for _ in range(-(-count // 8)):
        batch = next(stream)
        assert {a.shape for a in batch[:5]} == {(8, 64)}
        assert batch.weights.sum(axis=1).tolist() == [1.0] * 8
        for i in range(8):
            n = int(batch.segment_ids[i].sum())
            assert batch.positions[i, :n].tolist() == list(range(n))
            assert not batch.tokens[i, n:].any()
            assert batch.tokens[i, 0] == 256
            assert batch.tokens[i, n - 1] == 257
            seen[bytes(batch.tokens[i, 1 : n - 1].astype(np.uint8)).decode()] = batch.extra["labels"][i]
    held = [row for row in rows if int.from_bytes(hashlib.sha256(row[0].encode()).digest()[:8], "little") < 2**62]
    assert seen == {text[:62]: int(label == "pos") for text, label in rows if (text, label) not in held}
    batches = list(opened.validation())
    real = np.concatenate([b.weights for b in batches])[:, 0] == 1
    labels = np.concatenate([b.extra["labels"] for b in batches])
    assert real.sum() == len(held)
    assert labels[real].sum() == sum(label == "pos" for _, label in held)
    assert not labels[~real].any()
    over = sum(len(text) > 62 for text, _ in rows)
    assert f"{over} texts are longer than 64 tokens" in opened.notes[0]
    open_end = next(dataclasses.replace(data, closed=False).open(cache=tmp_path / "cache").training())
    assert not (open_end.tokens == 257).any()


@pytest.mark.parametrize(("before", "hosts"), [(0, 1), (1, 2), (7, 4), (17, 2), (40, 4)])
def test_it_goes_on_exactly_where_it_stopped(tmp_path, before, hosts):
    opened = spec(write_csv(tmp_path / "x.csv", rows_of(60))).open(cache=tmp_path / "cache")
    whole = opened.training()
    for _ in range(before):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    parts = [opened.training(host=h, hosts=hosts) for h in range(hosts)]
    for part in parts:
        part.restore(state)
    for _ in range(2):
        expected, got = next(whole), [next(part) for part in parts]
        for name in ("tokens", "weights", "positions", "segment_ids"):
            assert (getattr(expected, name) == np.concatenate([getattr(b, name) for b in got])).all()
        assert (expected.extra["labels"] == np.concatenate([b.extra["labels"] for b in got])).all()
    assert all(part.state() == whole.state() for part in parts)
    for stream in (whole, *parts):
        stream.close()


def test_other_processes_read_the_same(tmp_path):
    opened = spec(write_csv(tmp_path / "x.csv", rows_of(60))).open(cache=tmp_path / "cache")
    expected = next(opened.training())
    stream = Stream(opened._texts("train"), batch=8, epoch=1, identity={}, prefetch=ReadProcesses(count=1, batches=1))
    assert (next(stream).tokens == expected.tokens).all()
    stream.close()


def test_the_folder_is_made_once_and_its_contents_decide_the_fingerprint(tmp_path):
    cache, rows = tmp_path / "cache", rows_of(60)
    data = spec(write_csv(tmp_path / "x.csv", rows), tokenizer=BPE(vocab=280))
    first = data.open(cache=cache)
    stamp = (first.folder / "about.json").stat().st_mtime_ns
    other_view = dataclasses.replace(data, length=32, batch=4, seed=3, closed=False).open(cache=cache)
    assert other_view.folder == first.folder
    assert (first.folder / "about.json").stat().st_mtime_ns == stamp
    assert [s.split for s in first.stores] == ["train", "validation"]
    moved = spec(write_csv(tmp_path / "y.csv", rows), tokenizer=BPE(vocab=280)).open(cache=tmp_path / "two")
    assert [s.fingerprint for s in moved.stores] == [s.fingerprint for s in first.stores]
    assert data.identity() == spec(tmp_path / "y.csv", tokenizer=BPE(vocab=280)).identity()
    relabelled = [(text, "pos") if i == 0 else (text, label) for i, (text, label) in enumerate(rows)]
    relabelled[1] = (rows[1][0], "neg" if rows[1][1] == "pos" else "pos")
    changed = spec(write_csv(tmp_path / "z.csv", relabelled), tokenizer=BPE(vocab=280)).open(cache=cache)
    assert [s.fingerprint for s in changed.stores] != [s.fingerprint for s in first.stores]
    with pytest.raises(DataError, match="data of the checkpoint differs in length"):
        other_view.training().restore(first.training().state())
    listed = [dataclasses.asdict(s) for s in first.stores]
    again = data.reopen(listed)
    assert (next(again.validation()).tokens == next(first.validation()).tokens).all()
    elsewhere = data.elsewhere(str(tmp_path / "y.csv"), first.tokenizer_path, first.labels).open(cache=cache)
    assert sum(int(b.weights.sum()) for b in elsewhere.validation()) == 60
    assert elsewhere.tokenizer().fingerprint == first.tokenizer().fingerprint
    with pytest.raises(DataError, match="no text to train on"):
        elsewhere.training()
    for file in first.folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="are gone; name a file of texts with --data"):
        data.reopen(listed)


def test_a_python_file_fetches(tmp_path):
    script = tmp_path / "mine.py"
    write_csv(tmp_path / "x.csv", [("a", "1"), ("b", "0")])
    copy = "import shutil\ndef fetch(folder):\n    return [type(folder)(shutil.copy({!r}, folder))]\n"
    script.write_text(copy.format(str(tmp_path / "x.csv")))
    (file,) = files_of([str(script)], tmp_path / "cache")
    assert read(file) == [("a", "1"), ("b", "0")]
    script.write_text("def fetch(folder):\n    raise ValueError('no network')\n")
    with pytest.raises(UserError, match="no network"):
        files_of([str(script)], tmp_path / "cache")
    script.write_text("x = 1\n")
    with pytest.raises(DataError, match=r"has no function fetch\(\)"):
        files_of([str(script)], tmp_path / "cache")


def test_refusals(tmp_path):
    file = write_csv(tmp_path / "x.csv", rows_of(20))
    other = write_csv(tmp_path / "v.csv", [("good", "maybe")])
    cache = tmp_path / "cache"
    for fields, message in (
        ({"validation": (str(other),)}, r"v.csv: row 1: unknown label 'maybe'; expected one of: neg, pos"),
        ({"labels": ("pos", "great")}, r"unknown label 'neg'; expected one of: pos, great"),
        ({"train": ("nowhere.csv",)}, r"nowhere.csv: no such file; data.train and data.validation"),
        ({"tokenizer": File(path="nowhere")}, r"nowhere: no such tokenizer"),
        ({"train": (str(other),), "held_out": 0.0}, r"labels are maybe; a classifier needs at least two"),
        ({"batch": 9}, r"data.batch is 9; it must be a multiple of the number of hosts, 2"),
    ):
        with pytest.raises(DataError, match=message):
            spec(file, **fields).open(cache=cache).training(hosts=2)
    assert not [p for p in cache.rglob("*") if p.name.startswith(".")], "nothing half made stays"
    for fields, message in (
        ({"held_out": 1.0}, "data.held_out is 1.0"),
        ({"train": ()}, "data.train is empty"),
        ({"labels": ("a", "a")}, "data.labels is a, a"),
        ({"length": 1}, "data.length is 1"),
        ({"seed": -1}, "data.seed is -1"),
    ):
        with pytest.raises(DataError, match=message):
            spec(file, **fields)


def test_tokens_are_those_of_the_tokenizer(tmp_path):
    """Against the tokenizer itself, for one that was trained here."""
    rows = rows_of(40)
    opened = spec(write_csv(tmp_path / "x.csv", rows), tokenizer=BPE(vocab=300), held_out=0.0).open(
        cache=tmp_path / "c"
    )
    tokenizer = Tokenizer.load(opened.tokenizer_path)
    batch = opened._texts("train").rows([3, 5], 2)
    for i, number in enumerate((3, 5)):
        wanted = [*tokenizer.encode(rows[number][0], bos=True)[:63], tokenizer.eos_id]
        assert batch.tokens[i, : len(wanted)].tolist() == wanted
