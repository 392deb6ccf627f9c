"""Writing in shards, reading what others wrote, and refusing what nobody should have written."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from slmjax.convert.safetensors_io import INDEX, SINGLE, Tensors, open_checked, write
from slmjax.errors import StorageError, UserError

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
ARRAYS = {f"t.{i}": RNG.normal(size=(i + 2, 5)).astype(np.float32) for i in range(6)}


def raw(header, data=b"", length=None):
    """A safetensors file from its parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape=(2,), start=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE = {
    "empty file": b"",
    "shorter than the length field": b"\x01\x02",
    "giant header": raw({"a": tensor()}, bytes(8), length=2**63 - 1),
    "header of 200 MB": raw({"a": tensor()}, bytes(8), length=200_000_000),
    "header past the end": raw({"a": tensor()}, b"", length=4096),
    "no JSON": raw(b"{nonsense", bytes(8)),
    "not UTF-8": raw(b'{"\xff\xfe": 1}', bytes(8)),
    "a list": raw([1, 2], bytes(8)),
    "deeply nested": raw(b"[" * 100_000, bytes(8)),
    "overlap": raw({"a": tensor(), "b": tensor(start=4, end=12)}, bytes(12)),
    "hole": raw({"a": tensor(), "b": tensor(start=12, end=20)}, bytes(20)),
    "out of bounds": raw({"a": tensor(end=8)}, bytes(4)),
    "trailing bytes": raw({"a": tensor()}, bytes(9)),
    "negative offset": raw({"a": tensor(start=-8, end=0)}, bytes(8)),
    "end before start": raw({"a": tensor(start=8, end=0)}, bytes(8)),
    "shape overflows": raw({"a": tensor(shape=(2**62, 4))}, bytes(8)),
    "shape and size differ": raw({"a": tensor(shape=(3,))}, bytes(8)),
    "unknown dtype": raw({"a": tensor(dtype="PICKLE")}, bytes(8)),
    "same key twice": raw(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "truncated": raw({"a": tensor()}, bytes(8))[:-3],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    (tmp_path / SINGLE).write_bytes(HOSTILE[name])
    with pytest.raises(StorageError) as error:
        Tensors(tmp_path)
    assert SINGLE in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
near_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "F64", "BOOL", "F8_E4M3", "X"]),
        "shape": st.lists(st.integers(0, 2**40) | st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)
headers = json_values | st.dictionaries(
    st.sampled_from(["a", "b", "../c", "__metadata__", ""]), near_tensors, max_size=3
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers, data=st.binary(max_size=48), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_whole_or_refused(tmp_path, header, data, length):
    file = tmp_path / SINGLE
    file.write_bytes(raw(header, data, length))
    try:
        tensors = Tensors(tmp_path)
        arrays = {key: tensors[key] for key in tensors}
    except StorageError:
        return
    assert set(arrays) == set(header) - {"__metadata__"}
    for key, x in arrays.items():
        start, end = header[key]["data_offsets"]
        assert x.tobytes() == data[start:end]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_is_read_as_it_is_or_refused(tmp_path, place, value):
    file = tmp_path / SINGLE
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float32)}, file)
    data = bytearray(file.read_bytes())
    data[place % len(data)] = value
    file.write_bytes(data)
    try:
        tensors = Tensors(tmp_path)
        total = sum(tensors[key].nbytes for key in tensors)
    except StorageError:
        return
    assert total <= 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 200, 1])
def test_shards_hold_everything_once(tmp_path, dtype, shard_bytes):
    written = write(tmp_path, ARRAYS.items(), dtype=dtype, shard_bytes=shard_bytes)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(p.name for p in written)
    if shard_bytes == 10**9:
        assert names == [SINGLE]
    else:
        shards = [n for n in names if n.endswith(".safetensors")]
        assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = json.loads((tmp_path / INDEX).read_text())
        width = 4 if dtype == "float32" else 2
        assert index["metadata"]["total_size"] == width * sum(x.size for x in ARRAYS.values())
        assert set(index["weight_map"]) == set(ARRAYS)
        sizes = [
            sum(x.nbytes for x in map(open_checked(tmp_path / s).get_tensor, open_checked(tmp_path / s).keys()))
            for s in shards
        ]
        assert len(shards) == len(ARRAYS) if shard_bytes == 1 else max(sizes) <= shard_bytes
    tensors = Tensors(tmp_path)
    assert set(tensors) == set(ARRAYS)
    for key, x in ARRAYS.items():
        expected = x if dtype == "float32" else x.astype(ml_dtypes.bfloat16)
        assert tensors[key].dtype == expected.dtype
        assert tensors[key].tobytes() == expected.tobytes()


def test_views_are_written_as_they_read(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path, [("t", x.T), ("s", x[:, ::2])], dtype="float32")
    np.testing.assert_array_equal(Tensors(tmp_path)["t"], x.T)
    np.testing.assert_array_equal(Tensors(tmp_path)["s"], x[:, ::2])


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (np.finfo(np.float32).max, "bfloat16")]
)
def test_values_that_are_not_finite_are_not_written(tmp_path, value, dtype):
    with pytest.raises(UserError, match=r"parameter bad holds NaN or Inf"):
        write(tmp_path, [("bad", np.array([1, value], np.float32))], dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_not_read(tmp_path, dtype):
    save_file({"bad": np.array([1, np.nan], dtype)}, tmp_path / SINGLE)
    with pytest.raises(StorageError, match="'bad' holds NaN or Inf"):
        Tensors(tmp_path)["bad"]


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    write(tmp_path, ARRAYS.items(), dtype="float32", shard_bytes=300)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(StorageError, match=r"model-00001-of-00002\.safetensors is not a valid safetensors file"):
        Tensors(tmp_path)
    shard.unlink()
    with pytest.raises(StorageError, match=r"model-00001-of-00002\.safetensors is missing"):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "not a plain name"),
        ({"a": "/etc/passwd"}, "not a plain name"),
        ({"a": "sub\\..\\x.safetensors"}, "not a plain name"),
        ({"a": "model.bin"}, "not a plain name"),
        ({"a": ".."}, "not a plain name"),
        ({"a": "s.safetensors", "b": "s.safetensors"}, "tensor 'b' is in the index but not in the file"),
        ({}, None),
        ([1], "not an index of safetensors shards"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, weight_map, message):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "s.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if message is None:
        assert len(Tensors(tmp_path)) == 0
    else:
        with pytest.raises(StorageError, match=message):
            Tensors(tmp_path)


def test_an_index_that_leaves_a_tensor_out_is_refused(tmp_path):
    save_file({"a": np.zeros(2, np.float32), "z": np.zeros(2, np.float32)}, tmp_path / "s.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    with pytest.raises(StorageError, match="tensor 'z' is in the file but not in the index"):
        Tensors(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        Tensors(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Tensors(tmp_path / "nowhere")
