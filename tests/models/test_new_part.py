"""A mixer that slmjax has never heard of computes, decodes from a cache and is counted, from this file alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import batch, logits, parameters, tiny_llama

from slmjax.models.decoder import Block
from slmjax.models.families import FAMILIES
from slmjax.models.flops import flops_per_token, nonembedding_count
from slmjax.nn.compute import Compute
from slmjax.nn.parts import Mixer

pytestmark = pytest.mark.fast


@dataclass(frozen=True, kw_only=True)
class Shift(Mixer):
    """A learned share of the token before, within the segment."""

    label: ClassVar[str] = "shift"
    attended_width: ClassVar[int] = 0

    def table(self, positions):
        return positions[..., None] > 0

    def init_cache(self, batch, length, dtype, codec):
        return jnp.zeros((batch, 32), dtype)

    def __call__(self, layer, x, flow):
        table, cache, depth = flow.table, flow.cache, flow.depth
        last = jnp.zeros_like(x[:, :1]) if cache is None else cache[depth][:, None]
        before = jnp.where(table, jnp.concatenate([last, x[:, :-1]], axis=1), 0)
        after = None if cache is None else cache.at[depth].set(x[:, -1])
        shape = (x.shape[-1], x.shape[-1])
        y = layer.linear("share", "btd,de->bte", before, shape, ("embed", None), residual=True)
        return y, flow._replace(cache=after)


@pytest.fixture(scope="module")
def decoder():
    attention = tiny_llama().pattern[0]
    return replace(tiny_llama(), pattern=(attention, replace(attention, mixer=Shift())), repeats=2)


def test_it_has_its_own_paths_and_counts(decoder):
    assert {"layers/1/shift/share", "layers/1/shift_norm/scale", "layers/0/attn/q"} <= set(decoder.paths())
    assert isinstance(decoder.pattern[1], Block)
    flops = flops_per_token(decoder, 10)
    assert flops.attention - flops.head == 6 * 10 * 32 * 2
    assert flops.nonembedding == 6 * nonembedding_count(decoder)
    assert all(family.to_config(decoder) is None for family in FAMILIES)


@pytest.mark.parametrize("compute", [Compute(), Compute(unroll=None)], ids=["scan", "no loop"])
def test_it_decodes_from_its_cache(decoder, compute):
    model = decoder.build(compute)
    params, b = parameters(decoder, model), batch(length=8)
    step = jax.jit(lambda c, *tokens: model.apply(params, *tokens, cache=c))
    cache, pieces = model.init_cache(2, 8), []
    for start, stop in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]:
        out = step(cache, *(x[:, start:stop] for x in (b.tokens, b.positions, b.segment_ids)))
        cache = out.cache
        pieces.append(model.unembed(params, out.hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), logits(model, params, b), rtol=0, atol=1e-5)
