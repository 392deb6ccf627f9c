"""Which parameters a run begins with: rules for what may differ, and errors that name the tensor."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from slmjax import tree
from slmjax.errors import UserError
from slmjax.models.families.llama import llama
from slmjax.start import FromLayers, FromModel, FromScratch, content_hash

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


def test_some_layers_of_a_deeper_model_are_taken_in_their_order():
    def filled(layers, **kind):
        model = llama(vocab=11, **{**SIZES, "layers": layers, **kind}).build()
        numbers = lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape)  # noqa: E731
        return jax.tree.map(numbers, jax.eval_shape(model.init, jax.random.key(0))), model.axes

    given, (drawn, axes), start = filled(5)[0], filled(3), FromLayers(model="m", layers=(0, 2, 4))
    for path, x in tree.flatten(begin(start, drawn, given, axes)).items():
        wanted = tree.flatten(given)[path]
        np.testing.assert_array_equal(x, wanted[::2] if path.startswith("layers/") else wanted)
    with pytest.raises(UserError, match=r"start.layers: 2 layers are named, but this model has 3"):
        begin(replace(start, layers=(0, 2)), drawn, given, axes)
    with pytest.raises(UserError, match=r"start.layers: 5 is out of range; m has the layers 0 to 4"):
        begin(replace(start, layers=(0, 2, 5)), drawn, given, axes)
    with pytest.raises(
        UserError, match=r"layers/attn/k has shape \[3, 8, 1, 2\] in m and \[3, 8, 1, 4\] in this model"
    ):
        begin(start, drawn, filled(5, heads=4)[0], axes)


def test_layers_of_a_pattern_are_counted_by_turns():
    """Two kinds of layers by turns, then one more of the first kind: layer i of every kind is found."""
    number = lambda i: np.full(2, i)  # noqa: E731
    given = {
        "layers": {"0": {"a": np.stack([number(0), number(2)])}, "1": {"b": np.stack([number(1), number(3)])}},
        "layers_1": {"a": number(4)[None]},
        "embed": number(9),
    }
    axes = {"layers": {"a": ("layers", None)}, "layers_1": {"b": ("layers", None)}, "embed": (None,)}
    drawn = {"layers": {"a": np.zeros((2, 2))}, "layers_1": {"b": np.zeros((1, 2))}, "embed": np.zeros(2)}
    taken = begin(FromLayers(model="m", layers=(0, 4, 3)), drawn, given, axes)
    np.testing.assert_array_equal(taken["layers"]["a"][:, 0], [0, 4])
    np.testing.assert_array_equal(taken["layers_1"]["b"][:, 0], [3])
    assert taken["embed"][0] == 9
