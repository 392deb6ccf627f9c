"""Quantization-aware training against qwix (github.com/google/qwix), the bounds of its grid set to ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from slmjax import tree
from slmjax.compress.quant.activations import RoundedInputs
from slmjax.compress.quant.blocks import PerGroup
from slmjax.compress.quant.uniform import Symmetric
from slmjax.compress.quant.view import Quantize, Rule
from slmjax.nn.numerics import Product

# qwix 0.1.8 uses a name that flax has given up
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

WIDTHS = (24, 48, 5)
"""Of the input, the hidden layer, the output"""
AXES = {"layers": {"0": {"kernel": ("embed", "mlp")}, "1": {"kernel": ("mlp", "embed")}}}


class Theirs(nn.Module):
    """The model as qwix quantizes it."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(WIDTHS[1], use_bias=False, name="0")(x))
        return nn.Dense(WIDTHS[2], use_bias=False, name="1")(hidden)


def data():
    rng = np.random.default_rng(0)
    shapes = {"0": WIDTHS[:2], "1": WIDTHS[1:]}
    params = {k: {"kernel": jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32)} for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(64, WIDTHS[0])), jnp.float32)
    return params, x, jnp.asarray(np.sin(rng.normal(size=(64, 5))), jnp.float32)


def cross(bits):
    """qwix's scale is the largest value over 2^(b-1) - 1/2, ours over 2^(b-1) - 1."""
    return f"absmax,{(2 ** (bits - 1) - 0.5) / (2 ** (bits - 1) - 1)}"


def theirs(bits, group, inputs):
    rule = qwix.QtRule(
        module_path=".*",
        weight_qtype={4: jnp.int4, 8: jnp.int8}[bits],
        weight_calibration_method=cross(bits),
        act_qtype=jnp.int8 if inputs else None,
        act_calibration_method=cross(8),
        tile_size=group,
        # else the gradient of the input is that of the weights before rounding
        additional_qt_config={"use_original_residuals": False},
    )
    model = qwix.quantize_model(Theirs(), qwix.QtProvider([rule]))
    return lambda params, x: model.apply({"params": params}, x)


def ours(bits, group, inputs):
    quantizer = Symmetric(bits=bits, scale_type="float32")
    if group is not None:
        quantizer = Symmetric(bits=bits, scale_type="float32", granularity=PerGroup(size=group))
    view = Quantize(rules=(Rule(quantizer=quantizer, patterns=("layers/*",)),)).build(AXES)
    product = RoundedInputs(bits=8, patterns=("*",)) if inputs else Product()

    def apply(params, x):
        stored = {"layers": params}
        own, state = view.init(stored, jax.random.key(0))
        rounded = tree.flatten(view.apply(stored, own, state))
        hidden = nn.gelu(product("0", "bd,df->bf", x, rounded["layers/0/kernel"], jnp.einsum))
        return product("1", "bf,fd->bd", hidden, rounded["layers/1/kernel"], jnp.einsum)

    return apply


def computed(apply, x, y):
    """A program: parameters -> outputs, and the gradients of the parameters and of the input."""

    def loss(params, x):
        out = apply(params, x)
        return jnp.mean(jnp.square(out - y)), out

    def run(params):
        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return out, gradients

    return run


def close(a, b, most):
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=most)


@pytest.mark.parametrize(("bits", "inputs"), [(4, False), (8, False), (8, True)])
def test_outputs_gradients_and_training_agree(bits, inputs):
    params, x, y = data()
    optimizer = optax.adam(3e-3)

    def trained(run):
        """Outputs and gradients of 10 steps, and the parameters after them."""

        def step(carry, _):
            params, state = carry
            out, gradients = run(params)
            updates, state = optimizer.update(gradients[0], state)
            return (optax.apply_updates(params, updates), state), (out, gradients)

        (after, _), each = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=10))(params)
        return after, each

    mine, other = (trained(computed(make(bits, None, inputs), x, y)) for make in (ours, theirs))
    first, last = (np.mean(np.square(mine[1][0][i] - y)) for i in (0, -1))
    assert last < 0.97 * first
    plain = Theirs().apply({"params": params}, x)
    assert np.abs(mine[1][0][0] - plain).max() > 1e-3  # it is rounded
    close(jax.tree.map(lambda x: x[0], mine[1]), jax.tree.map(lambda x: x[0], other[1]), 2e-6)
    close(mine, other, 2e-4)


def test_groups_agree():
    """Outputs, and the gradient of the last matrix: in groups, qwix takes the gradient of the inputs of a product with
    the matrix before rounding."""
    params, x, y = data()
    mine, other = (jax.jit(computed(make(4, 8, False), x, y))(params) for make in (ours, theirs))
    close(mine[0], other[0], 2e-6)
    close(mine[1][0]["1"], other[1][0]["1"], 1e-6)
