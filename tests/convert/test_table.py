"""The interpreter of rows on small made-up trees: both directions, fused rows, patterns of blocks, and mistakes."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from models.tiny import tiny_llama

from slmjax.convert.table import entries, to_ours, to_theirs
from slmjax.errors import StorageError, UserError
from slmjax.models.decoder import Stage
from slmjax.models.families.common.rows import Row, present
from slmjax.nn.mlp import MLP
from slmjax.tree import flatten, unflatten

pytestmark = pytest.mark.fast

ROWS = (
    Row("embed/table", "base.wte.weight", "v d -> v d"),
    Row("layers/attn/q", "base.h.{}.q.weight", "(h k) d -> d h k"),
    Row("layers/attn/o", "base.h.{}.o.weight", "d (h k) -> h k d"),
    Row(("layers/mlp/gate", "layers/mlp/up"), "base.h.{}.gate_up.weight", "f d -> d f", 0),
    Row("final_norm/scale", "base.ln.weight", "d -> d"),
)
SHAPES = {
    "embed/table": (11, 6),
    "layers/attn/q": (3, 6, 2, 4),
    "layers/attn/o": (3, 2, 4, 6),
    "layers/mlp/gate": (3, 6, 5),
    "layers/mlp/up": (3, 6, 7),
    "final_norm/scale": (6,),
}


def make(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


def abstract(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)


def same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].tobytes() == b[path].tobytes(), path


def test_each_direction_is_what_the_pattern_says():
    params = make(SHAPES)
    theirs = dict(to_theirs(ROWS, params))
    assert {k: v.shape for k, v in theirs.items()} == {e.key: e.shape for e in entries(ROWS, params)}
    assert set(theirs) == {"base.wte.weight", "base.ln.weight"} | {
        f"base.h.{i}.{name}.weight" for i in range(3) for name in ("q", "o", "gate_up")
    }
    for i in range(3):  # by hand, without einops
        q = params["layers"]["attn"]["q"][i]
        np.testing.assert_array_equal(theirs[f"base.h.{i}.q.weight"], q.reshape(6, 8).T)
        np.testing.assert_array_equal(theirs[f"base.h.{i}.o.weight"], params["layers"]["attn"]["o"][i].reshape(8, 6).T)
        fused = np.concatenate([params["layers"]["mlp"]["gate"][i].T, params["layers"]["mlp"]["up"][i].T])
        np.testing.assert_array_equal(theirs[f"base.h.{i}.gate_up.weight"], fused)
    same(to_ours(ROWS, theirs, abstract(params)), params)


def test_jax_arrays_and_half_precision_files():
    params = make(SHAPES)
    theirs = dict(to_theirs(ROWS, jax.tree.map(jax.numpy.asarray, params)))
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in theirs.items()}
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    same(to_ours(ROWS, half, abstract(params)), rounded)


def test_interleaved_and_enumerated_tensors():
    """q, k, v a head (Pythia); a tensor a head (StableLM); by hand, without einops."""
    qkv = ("layers/attn/q", "layers/attn/k", "layers/attn/v")
    rows = (
        Row(qkv, "h.{}.qkv.weight", "(h n k) d -> n d h k"),
        Row("layers/attn/q_norm/scale", "h.{}.norms.{each}.weight", "k -> h k", each="h"),
    )
    params = make({**dict.fromkeys(qkv, (2, 6, 3, 4)), "layers/attn/q_norm/scale": (2, 3, 4)})
    theirs = dict(to_theirs(rows, params))
    assert set(theirs) == {f"h.{i}.{k}.weight" for i in range(2) for k in ("qkv", "norms.0", "norms.1", "norms.2")}
    attn = params["layers"]["attn"]
    for i, h in np.ndindex(2, 3):
        for n, name in enumerate("qkv"):
            np.testing.assert_array_equal(theirs[f"h.{i}.qkv.weight"].reshape(3, 3, 4, 6)[h, n], attn[name][i, :, h].T)
        np.testing.assert_array_equal(theirs[f"h.{i}.norms.{h}.weight"], attn["q_norm"]["scale"][i, h])
    same(to_ours(rows, theirs, abstract(params)), params)


def test_rows_are_written_out_for_each_place_of_a_decoder():
    one = tiny_llama().pattern[0]
    two = replace(one, mlp=MLP(hidden=9))
    decoder = replace(tiny_llama(), pattern=(one, two), repeats=2, tail=(Stage(pattern=(one,), repeats=3),))
    rows = present(
        (Row("layers/mlp/gate", "h.{}.gate", "f d -> d f"), Row("layers/mlp/x", "h.{}.x", "i -> i")), decoder
    )
    assert [(row.ours, row.numbers) for row in rows] == [
        ("layers/0/mlp/gate", (0, 2)),
        ("layers_1/mlp/gate", (4, 5, 6)),
    ]


def test_a_pattern_of_blocks_counts_layers_across_blocks():
    rows = (
        Row("layers/0/w", "h.{}.a", "i j -> j i", numbers=(0, 3)),
        Row("layers/1/w", "h.{}.b", "i j -> i j", numbers=(1, 4)),
        Row("layers/2/w", "h.{}.a", "i j -> i j", numbers=(2, 5)),
    )
    params = make({f"layers/{i}/w": (2, 3, 4) for i in range(3)})
    theirs = dict(to_theirs(rows, params))
    assert list(theirs) == ["h.0.a", "h.3.a", "h.1.b", "h.4.b", "h.2.a", "h.5.a"]
    np.testing.assert_array_equal(theirs["h.3.a"], params["layers"]["0"]["w"][1].T)
    np.testing.assert_array_equal(theirs["h.5.a"], params["layers"]["2"]["w"][1])
    same(to_ours(rows, theirs, abstract(params)), params)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:-1], "no row covers final_norm/scale"),
        ((*ROWS, ROWS[0]), "embed/table is covered by 2 rows"),
        ((*ROWS, Row("layers/attn/v", "x.{}", "d -> d")), "layers/attn/v is not a parameter"),
        (
            (*ROWS[:-1], Row("final_norm/scale", "base.wte.weight", "d -> d")),
            "several rows write the key base.wte.weight",
        ),
        ((*ROWS[:-1], Row("final_norm/scale", "base.ln.weight", "d e -> d e")), "does not fit final_norm/scale"),
        ((*ROWS[:3], ROWS[3]._replace(split=None), ROWS[4]), "names no `split` axis"),
    ],
)
def test_a_wrong_table_is_refused(rows, message):
    with pytest.raises(UserError, match=message):
        entries(rows, make(SHAPES))


def test_missing_misshapen_unexpected_and_integer_tensors_are_named():
    params = make(SHAPES)
    theirs = dict(to_theirs(ROWS, params))

    def refused(change, message):
        with pytest.raises(StorageError, match=message):
            to_ours(ROWS, {k: v for k, v in (theirs | change).items() if v is not None}, abstract(params))

    refused({"base.h.1.q.weight": None}, r"tensor base.h.1.q.weight of shape \[8, 6\] is missing$")
    refused({"base.h.1.q.weight": None, "base.ln.weight": None}, "missing and 1 more")
    refused(
        {"base.h.2.o.weight": np.zeros((6, 9), np.float32)}, r"base.h.2.o.weight has shape \[6, 9\]; expected \[6, 8\]"
    )
    refused({"base.h.3.q.weight": theirs["base.h.2.q.weight"]}, "'base.h.3.q.weight' has no place")
    refused({"base.ln.weight": np.zeros(6, np.int8)}, "base.ln.weight is int8; expected float32")
    refused(
        {"lm_head.weight": np.zeros((11, 6), np.float32)},
        "lm_head.weight differs from base.wte.weight, but the model is tied",
    )


def test_what_old_files_hold_besides_the_parameters():
    params = make(SHAPES)
    theirs = dict(to_theirs(ROWS, params))
    extra = {
        "lm_head.weight": theirs["base.wte.weight"],
        "base.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8),
        "base.h.0.attn.masked_bias": np.float32(-1e4),
        "base.h.1.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    same(to_ours(ROWS, theirs | extra, abstract(params)), params)
    bare = {k.removeprefix("base."): v for k, v in theirs.items()}
    same(to_ours(ROWS, bare, abstract(params)), params)
