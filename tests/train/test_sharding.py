"""Meshes, rules, and placements of what mirrors the parameters."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from train import toy

from slmjax import tree
from slmjax.errors import UserError
from slmjax.train import sharding
from slmjax.train.sharding import Layout, Mesh

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (Mesh(), (8, 1, 1)),
        (Mesh(data=2, fsdp=4), (2, 4, 1)),
        (Mesh(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (Mesh(data=1, tensor=8), (1, 1, 8)),
    ],
)
def test_sizes_multiply_to_the_devices(mesh, shape):
    built = mesh.build()
    assert tuple(built.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert sorted(d.id for d in built.devices.flat) == list(range(8))


@pytest.mark.parametrize("mesh", [Mesh(data=3), Mesh(data=2), Mesh(data=-1, fsdp=-1), Mesh(tensor=0), Mesh(fsdp=16)])
def test_sizes_that_do_not_fit_are_the_users_mistake(mesh):
    with pytest.raises(UserError, match=rf"mesh data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}"):
        mesh.build()


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("vocab", "embed"), (16, 8), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), (3, 8, 4, 2), P(None, "fsdp", "tensor", None)),
        (("layers", "embed", "kv_heads", "head_dim"), (3, 8, 3, 2), P(None, "fsdp", None, None)),  # 3 over 2: whole
        (("vocab", "mlp"), (16, 8), P("tensor", None)),  # both want the tensor axis: the first has it
        (("context", None), (16, 8), P(None, None)),
        ((), (), P()),
    ],
)
def test_rules(axes, shape, expected):
    assert Layout().spec(axes, shape, {"data": 2, "fsdp": 2, "tensor": 2}) == expected


def test_what_stays_whole_is_told():
    params = {"k": jax.ShapeDtypeStruct((8, 3, 2), np.float32), "up": jax.ShapeDtypeStruct((8, 4), np.float32)}
    axes = {"k": ("embed", "kv_heads", "head_dim"), "up": ("embed", "mlp")}
    told = Layout().replicated(params, axes, {"data": 2, "fsdp": 2, "tensor": 2})
    assert told == {"k": "kv_heads=3 is not divisible by tensor=2"}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, lambda p: {k: "ab"[k == "embed"] for k in p}
        ),
    ],
)
def test_optimizer_state_lies_where_its_parameters_lie(optimizer):
    mesh = Mesh(data=2, fsdp=2, tensor=2).build()
    params = jax.eval_shape(toy.init, jax.random.key(0))
    placed = Layout().shardings(params, toy.AXES, mesh)
    state = jax.eval_shape(optimizer.init, params)
    found = tree.flatten(sharding.mirror(state, params, placed, mesh))
    flat = tree.flatten(placed)
    copies = [(path, p) for path in found for p in flat if path.endswith("/" + p)]
    assert len(copies) >= len(flat)
    assert all(found[path] == flat[p] for path, p in copies)
    assert all(found[path].spec == P() for path in found if path not in dict(copies))


def test_leaves_of_another_shape_are_replicated():
    mesh = Mesh(data=2, fsdp=2, tensor=2).build()
    params = jax.eval_shape(toy.init, jax.random.key(0))
    placed = Layout().shardings(params, toy.AXES, mesh)
    state = {"row": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[:1], x.dtype), params)}
    found = tree.flatten(sharding.mirror(state, params, placed, mesh))
    assert found["row/embed/table"].spec == P()
    assert found["row/final_norm/scale"].spec == P("fsdp")


def test_rows_are_split_over_data_and_fsdp():
    mesh = Mesh(data=2, fsdp=2, tensor=2).build()
    batch = toy.batch(0)
    put = Layout().put(batch, mesh)
    assert put.tokens.sharding.shard_shape(put.tokens.shape) == (toy.B // 4, toy.T)
    for there, here in zip(jax.tree.leaves(put), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(there, here)


def test_rows_that_cannot_be_split_are_the_users_mistake():
    with pytest.raises(UserError, match=r"batch 6 cannot be split over 8 devices \(mesh data=8 fsdp=1 tensor=1\)"):
        Layout().put(toy.batch(0, rows=6), Mesh().build())


def test_another_layout_splits_other_axes_and_the_tokens_of_each_row():
    layout = Layout(rules=(("mlp", "fsdp"),), rows=("data",), tokens=("tensor",))
    mesh = Mesh(data=2, fsdp=2, tensor=2).build()
    assert layout.spec(("embed", "mlp"), (8, 24), mesh.shape) == P(None, "fsdp")
    assert layout.split(("embed", "mlp"), (8, 24), mesh.shape) == 2
    batch = toy.batch(0)._replace(extra={"labels": np.arange(toy.B), "pairs": np.zeros((toy.B, 3, 2))})
    put = layout.put(batch, mesh)
    assert put.tokens.sharding.shard_shape(put.tokens.shape) == (toy.B // 2, toy.T // 2)
    assert put.extra["labels"].sharding.shard_shape((toy.B,)) == (toy.B // 2,)
    assert put.extra["pairs"].sharding.shard_shape((toy.B, 3, 2)) == (toy.B // 2, 3, 2)
    np.testing.assert_array_equal(put.targets, batch.targets)


def test_how_often_an_array_is_split():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert Layout().split(("layers", "embed", "heads", "head_dim"), (3, 64, 4, 8), mesh) == 8
    assert Layout().split(("layers", "embed", "kv_heads", "head_dim"), (3, 64, 3, 8), mesh) == 4
    assert Layout().split(("layers", "embed"), (3, 6), mesh) == 1
