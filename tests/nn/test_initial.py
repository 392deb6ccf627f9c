"""Initial values by role: one deviation for all, or one that follows from the sizes of a matrix."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from models.tiny import tiny_llama

from slmjax.errors import UserError
from slmjax.models.assembly import is_declared
from slmjax.models.families.bert import bert
from slmjax.nn.initial import Initial, Normal
from slmjax.tree import flatten

pytestmark = pytest.mark.fast


@dataclass(frozen=True, kw_only=True)
class FanIn(Initial):
    """1/sqrt(fan-in); 1 for tables that are looked up, 1/width for the unembedding; what is added to the stream is
    divided by the number of layers."""

    def __call__(self, role):
        if role.path == "unembed/table":
            std = 1 / role.size("embed")
        elif role.fan_in is None:
            std = 1.0
        else:
            std = role.fan_in**-0.5 * (2 / role.branches if role.residual else 1.0)
        return initializers.normal(std), f"fan_in({std:.4g})"


def test_deviations_follow_from_roles():
    decoder = replace(tiny_llama(width=64, hidden=96, tied=False, layers=4), initial=FanIn())
    params = flatten(decoder.build().init(jax.random.key(0)))
    expected = {
        "embed/table": 1.0,
        "layers/attn/q": 64**-0.5,
        "layers/attn/k": 64**-0.5,
        "layers/attn/v": 64**-0.5,
        "layers/attn/o": 64**-0.5 / 4,  # heads times head_dim are summed
        "layers/mlp/gate": 64**-0.5,
        "layers/mlp/up": 64**-0.5,
        "layers/mlp/down": 96**-0.5 / 4,
        "unembed/table": 1 / 64,
    }
    drawn = {path: x for path, x in params.items() if not path.endswith("scale")}
    assert drawn.keys() == expected.keys()
    for path, x in drawn.items():
        assert float(x.std()) == pytest.approx(expected[path], rel=5 / math.sqrt(x.size)), path
    words = flatten(decoder.declared(), is_leaf=is_declared)
    assert words["layers/mlp/down"].initial == f"fan_in({96**-0.5 / 4:.4g})"


def test_an_encoder_tells_its_roles_too():
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Noted(Normal):
        def __call__(self, role):
            seen[role.path] = role
            return super().__call__(role)

    replace(bert(layers=2, width=16, heads=2, hidden=24, vocab=61, context=32), initial=Noted()).declared()
    assert seen["head/transform"].fan_in == 16
    assert seen["layers/mlp/down"] == ("layers/mlp/down", (24, 16), ("mlp", "embed"), 24, True, 1)
    assert seen["embed/table"].fan_in is None


def test_a_population_draws_with_a_deviation_each():
    stds = jnp.asarray([0.01, 0.05])

    def drawn(std):
        return replace(tiny_llama(layers=1), initial=Normal(std=std, residual=2 * std)).build().init(jax.random.key(1))

    both = jax.jit(jax.vmap(drawn))(stds)
    alone = jax.jit(lambda: drawn(0.05))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-8), both, alone)


@pytest.mark.parametrize("field", ["std", "residual"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_numbers_are_checked_where_a_model_is_made(field, value):
    with pytest.raises(UserError, match=rf"initial\.{field}: {value} is not a number of at least 0"):
        replace(tiny_llama(), initial=Normal(**{field: value}))
