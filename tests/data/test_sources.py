"""Each kind of source gives its documents, and each kind of damage its one line."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmjax.data.cleaning import Clean
from slmjax.data.records import Report, lines
from slmjax.data.sources import JSONL, Folder, Hub, Parquet, Text
from slmjax.errors import DataError

pytestmark = pytest.mark.fast

TEXTS = ["one\u2028still one", "zwei äöü", "three\nlines\n", "四"]


def jsonl_bytes(texts=TEXTS):
    return b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl_bytes()))
    assert list(JSONL(path="*.jsonl*", licence="x").documents(tmp_path)) == TEXTS
    assert list(JSONL(path="*.jsonl*", licence="x", limit=2).documents(tmp_path)) == TEXTS[:2]


def test_zst_of_several_frames_larger_than_a_read(tmp_path):
    texts = [f"{i} " + "x" * 997 for i in range(4000)]
    pack = zstandard.ZstdCompressor(level=1).compress
    frames = [pack(jsonl_bytes(texts[i : i + 1000])) for i in range(0, 4000, 1000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert list(JSONL(path="a.jsonl.zst", licence="x").documents(tmp_path)) == texts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_compression_names_the_file(tmp_path, suffix, damage):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    whole = pack(jsonl_bytes([str(i) * 50 for i in range(999)]))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[:-20] if damage == "truncated" else b"not compressed at all")
    with pytest.raises(DataError, match=f"a.jsonl{suffix}: cannot be decompressed"):
        list(JSONL(path=path.name, licence="x").documents(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a.jsonl:2: not JSON"),
        (b'["text"]', r"a.jsonl:2: expected a JSON object a line, found list"),
        (b'{"content": "x"}', r"a.jsonl:2: has no field 'text'; there are: content. Set text_field"),
        (b'{"text": 3}', r"a.jsonl:2: field 'text' holds int, expected text"),
        (b'{"text": "\xff"}', r"a.jsonl:2: not JSON"),
    ],
)
def test_malformed_lines_are_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(JSONL(path="a.jsonl", licence="x").documents(tmp_path))


def test_null_text_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "b"}')
    assert list(JSONL(path="a.jsonl", licence="x").documents(tmp_path)) == ["", "b"]


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(Text(path="*.txt", licence="x").documents(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        list(Folder(path="nowhere", licence="x").documents(tmp_path))


@pytest.mark.parametrize(
    ("separator", "expected"),
    [("\n\n", ["a\nb", "c", "d\n"]), ("", ["a\nb\n\nc\n\n\n\nd\n"]), ("\nb\n", ["a", "\nc\n\n\n\nd\n"])],
)
def test_text_separators(tmp_path, separator, expected):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n\n\n\nd\n")
    assert list(Text(path="a.txt", licence="x", separator=separator).documents(tmp_path)) == expected


def test_text_with_windows_line_ends_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("slmjax.data.reading.READ_BYTES", 3)
    (tmp_path / "a.txt").write_bytes(b"a b\r\n\r\nc\r\n\r\n\r\nd")
    assert [t.strip() for t in Text(path="a.txt", licence="x").documents(tmp_path)] == ["a b", "c", "d"]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt:1: not UTF-8"):
        list(Text(path="a.txt", licence="x").documents(tmp_path))


def test_parquet(tmp_path):
    for i, half in enumerate((TEXTS[:2], [*TEXTS[2:], None])):
        pq.write_table(pa.table({"text": half, "id": range(len(half))}), tmp_path / f"{i}.parquet")
    assert list(Parquet(path="*.parquet", licence="x").documents(tmp_path)) == [*TEXTS, ""]
    with pytest.raises(DataError, match="has no field 'body'; there are: text, id"):
        list(Parquet(path="*.parquet", licence="x", text_field="body").documents(tmp_path))
    (tmp_path / "0.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match=r"0.parquet: not a readable Parquet file"):
        list(Parquet(path="*.parquet", licence="x").documents(tmp_path))


def test_saved_datasets(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "many"))
    assert list(Folder(path="one", licence="x").documents(tmp_path)) == TEXTS
    assert list(Folder(path="many", licence="x", split="test").documents(tmp_path)) == TEXTS[:1]
    with pytest.raises(DataError, match="has no split 'dev'; there are: train, test"):
        list(Folder(path="many", licence="x", split="dev").documents(tmp_path))


def test_plain_data_folders_through_datasets(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_bytes(jsonl_bytes())
    assert list(Folder(path="plain", licence="x").documents(tmp_path)) == TEXTS
    assert list(Hub(path="plain", licence="x").documents(tmp_path)) == TEXTS
    with pytest.raises(DataError, match="has no field 'body'"):
        list(Folder(path="plain", licence="x", text_field="body").documents(tmp_path))


def test_a_hub_layout_with_configurations(tmp_path):
    """The layout of FineWeb-Edu and Wikipedia: Parquet, and configurations in the card."""
    folder = tmp_path / "hub"
    (folder / "sample").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: sample/*\n---\n"
    (folder / "README.md").write_text(card)
    pq.write_table(pa.table({"text": TEXTS}), folder / "sample" / "0.parquet")
    assert list(Hub(path="hub", config="small", licence="x", limit=3).documents(tmp_path)) == TEXTS[:3]
    with pytest.raises(DataError, match="data set 'hub' cannot be opened"):
        list(Hub(path="hub", config="large", licence="x").documents(tmp_path))


def test_cleaning():
    clean = Clean()
    assert clean("a\u0301 b  \r\n\r\n\r\n\r\nc\x00\x1b\ufeff\ud800 ") == ("\u00e1 b\n\nc", None)
    assert clean(" \n\t ") == ("", "empty")
    assert Clean(min_chars=5)("four") == ("", "too short")
    assert Clean(max_chars=3)("four") == ("", "too long")
    assert Clean(whitespace=False)(" a \n\n\n b") == (" a \n\n\n b", None)
    assert Clean(normalize=False)("a\u0301") == ("a\u0301", None)


@pytest.mark.parametrize("read", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("separator", ["\r\n---\r\n", "\n---\n", "\n\n", "-", "é\n"])
def test_line_ends_are_alike_in_text_and_separator_wherever_a_read_ends(tmp_path, monkeypatch, read, separator):
    """The documents are those of the whole text, split at once."""
    monkeypatch.setattr("slmjax.data.reading.READ_BYTES", read)
    raw = "café\r\n---\r\nb\rc\r\r\n\r\n--\n---\nd -é\r\n---\r\n---\r\n \r\n---\r\ne\r"
    (tmp_path / "a.txt").write_bytes(raw.encode())
    wanted = [t for t in raw.replace("\r\n", "\n").split(separator.replace("\r\n", "\n")) if t.strip()]
    assert list(Text(path="a.txt", separator=separator).documents(tmp_path)) == wanted


def test_a_separator_that_never_occurs_is_said(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one\n---\ntwo")
    report = Report()
    source = Text(path="*.txt", separator="\n***\n", licence="x")
    assert len(list(source.documents(tmp_path, report))) == 2
    (said,) = lines([{"name": "mine", "licence": "x", **report.json()}])
    assert said == "mine: the separator '\\n***\\n' does not occur in any of 2 files: each file is one document"
    report = Report()
    assert len(list(Text(path="*.txt", separator="\n---\n").documents(tmp_path, report))) == 4
    assert report.json() == {}


def test_bad_records_are_named_ten_at_a_time_or_left_out(tmp_path):
    rows = ['{"text": "good"}' if i % 3 else '{"txt": "x"}' for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"text": "a", "text": "b"}', "{"]))
    with pytest.raises(DataError) as strict:
        list(JSONL(path="a.jsonl").documents(tmp_path))
    assert [f"a.jsonl:{line}" in str(strict.value) for line in (1, 4, 28, 31)] == [True, True, True, False]
    assert "on_error='skip'" in str(strict.value)
    assert str(strict.value).count("has no field 'text'") == 1
    report = Report()
    assert list(JSONL(path="a.jsonl", on_error="skip").documents(tmp_path, report)) == ["good"] * 40 + ["b"]
    bad, twice, licence = lines([{"name": "mine", "licence": "unknown", **report.json()}])
    assert bad.startswith("mine: 21 bad records were left out: ")
    assert bad.endswith("and 11 more")
    assert "a.jsonl:61" in twice
    assert "the key 'text' is twice in an object; the last one counts" in twice
    assert "its licence is unknown" in licence
    with pytest.raises(DataError, match=r"a.jsonl: 6 bad records, more than max_bad 5"):
        list(JSONL(path="a.jsonl", on_error="skip", max_bad=5).documents(tmp_path))
    assert list(JSONL(path="a.jsonl", on_error="skip", limit=3).documents(tmp_path)) == ["good"] * 3


def test_text_that_is_not_utf8_is_left_out_by_document_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n\ntwo\nzwei\xff\n\nthree".encode("latin-1"))
    report = Report()
    assert list(Text(path="a.txt", on_error="skip").documents(tmp_path, report)) == ["one", "three"]
    assert [one.where for one in report.first] == [f"{tmp_path / 'a.txt'}:4"]
