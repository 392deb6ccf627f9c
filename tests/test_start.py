"""Which parameters a run begins with: rules for what may differ, and errors that name the tensor."""

import jax
import numpy as np
import pytest

from slmjax import tree
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.start import FromModel, FromScratch, content_hash

pytestmark = pytest.mark.fast

SIZES = {"layers": 1, "width": 8, "heads": 2, "kv_heads": 1, "hidden": 12, "context": 16, "tied": False}
MODEL, GROWN = llama(vocab=11, **SIZES).build(), llama(vocab=13, **SIZES).build()
GIVEN = jax.device_get(MODEL.init(jax.random.key(1)))
DRAWN, LARGER = (jax.device_get(model.init(jax.random.key(0))) for model in (MODEL, GROWN))


def begin(start, drawn=DRAWN, given=GIVEN, axes=MODEL.axes):
    return start.parameters(drawn, given, axes)


def test_from_scratch_is_what_was_drawn():
    assert FromScratch().source is None
    assert begin(FromScratch()) is DRAWN


def test_every_tensor_is_taken():
    jax.tree.map(np.testing.assert_array_equal, begin(FromModel(model="m")), GIVEN)


def test_what_is_new_is_drawn():
    taken = begin(FromModel(model="m", new=("unembed/*",)))
    np.testing.assert_array_equal(taken["unembed"]["table"], DRAWN["unembed"]["table"])
    np.testing.assert_array_equal(taken["embed"]["table"], GIVEN["embed"]["table"])


def test_a_larger_vocabulary_keeps_the_rows_that_there_are():
    start = FromModel(model="m", grow_vocabulary=True)
    taken = begin(start, LARGER, axes=GROWN.axes)
    for table in ("embed", "unembed"):
        np.testing.assert_array_equal(taken[table]["table"][:11], GIVEN[table]["table"])
        np.testing.assert_array_equal(taken[table]["table"][11:], LARGER[table]["table"][11:])
    shapes = jax.eval_shape(GROWN.init, jax.random.key(0))
    checked = begin(start, shapes, axes=GROWN.axes)
    assert isinstance(checked["embed"]["table"], jax.ShapeDtypeStruct)


def without(params, path):
    return tree.without(params, {path})


@pytest.mark.parametrize(
    ("start", "arguments", "message"),
    [
        ({}, {"given": without(GIVEN, "layers/mlp/up")}, r"m has no layers/mlp/up, .*start.new = \('layers/mlp/up',\)"),
        (
            {},
            {"drawn": without(DRAWN, "layers/mlp/up")},
            r"m has layers/mlp/up, which this model lacks; .*start.dropped",
        ),
        ({}, {"drawn": LARGER, "axes": GROWN.axes}, "embed/table has 11 rows in m and 13 .* start.grow_vocabulary"),
        (
            {"grow_vocabulary": True},
            {"drawn": DRAWN, "given": LARGER},
            r"embed/table has shape \[13, 8\] in m and \[11, 8\] in this model",
        ),
        ({"new": ("head/*",)}, {}, r"start.new: 'head/\*' matches no parameter; the parameters are: embed/table"),
        ({"dropped": ("head/*",)}, {}, r"start.dropped: 'head/\*' matches no parameter"),
    ],
)
def test_anything_else_is_an_error_that_names_the_tensor(start, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        begin(FromModel(model="m", **start), **arguments)
    assert "\n" not in str(caught.value)


def test_what_is_dropped_may_be_there():
    start = FromModel(model="m", dropped=("layers/mlp/up",))
    assert "up" not in begin(start, without(DRAWN, "layers/mlp/up"))["layers"]["mlp"]


def test_the_hash_is_of_the_contents_alone():
    same = {k: GIVEN[k] for k in reversed(list(GIVEN))}
    assert content_hash(GIVEN) == content_hash(same) == content_hash(jax.tree.map(jax.numpy.asarray, GIVEN))
    for changed in (
        jax.tree.map(lambda x: x + (x == x.max()), GIVEN),
        {**GIVEN, "embed": {"table": GIVEN["embed"]["table"].reshape(8, 11)}},
        {**without(GIVEN, "embed/table"), "table": GIVEN["embed"]["table"]},
    ):
        assert content_hash(changed) != content_hash(GIVEN)
