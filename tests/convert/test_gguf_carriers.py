"""Packed types of llama.cpp: bits in their places, which type takes a grid, and that it holds it exactly."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.compress.quant.blocks import PerChannel, PerGroup, PerTensor
from slmjax.compress.quant.grids import Nearest
from slmjax.compress.quant.learned import LSQ, SEQ, Balanced, Binary
from slmjax.compress.quant.uniform import Asymmetric, BitNet, Symmetric
from slmjax.compress.quant.view import Packed
from slmjax.convert.gguf import carriers, layouts
from slmjax.convert.gguf.carriers import CARRIERS, carrier_of
from slmjax.convert.packed import PackedTensor, kind_of, reduced, spread
from slmjax.errors import UserError

pytestmark = pytest.mark.fast

NAMED = {carrier.format.name: carrier for carrier in CARRIERS}
GRIDS = {  # the widest that each holds, mirrored or between integers where it can be
    "Q1_0": [Nearest(low=-1, high=0, offset=0.5)],
    "TQ1_0": [Nearest(low=-1, high=1)],
    "TQ2_0": [Nearest(low=-2, high=1), Nearest(low=-1, high=2)],
    "Q2_0": [Nearest(low=-2, high=1), Nearest(low=-1, high=2)],
    "Q2_K": [Nearest(low=-2, high=1, offset=0.5), Nearest(low=-2, high=1), Nearest(low=0, high=3)],
    "Q3_K": [Nearest(low=-4, high=3), Nearest(low=-3, high=4), Nearest(low=-2, high=1, offset=0.5)],
    "Q4_0": [Nearest(low=-8, high=7), Nearest(low=-4, high=3, offset=0.5)],
    "Q4_K": [Nearest(low=-8, high=7, offset=0.5), Nearest(low=-8, high=7), Nearest(low=0, high=15)],
    "Q5_0": [Nearest(low=-16, high=15), Nearest(low=-8, high=7, offset=0.5)],
    "Q6_K": [Nearest(low=-32, high=31), Nearest(low=-16, high=15, offset=0.5)],
    "Q8_0": [Nearest(low=-128, high=127), Nearest(low=-64, high=63, offset=0.5)],
}
EVERY = [(name, grid) for name, grids in GRIDS.items() for grid in grids]
STEPS = st.floats(2.0**-13, 8.0, width=16)


def tensor(grid, rows, width, group, steps, seed=0, zeros=None):
    """Random codes, each row beginning with all codes of the grid, as far as they fit."""
    codes = np.random.default_rng(seed).integers(grid.low, grid.high + 1, (rows, width))
    codes[:, : min(width, grid.levels)] = np.arange(grid.low, grid.high + 1)[:width]
    return PackedTensor(codes.astype(np.int16), steps.astype(np.float32).reshape(rows, width // group), zeros, grid)


def exact(found, expected):
    """Equal, the sign of zero included."""
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("name", "grid"), EVERY)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_values_come_back_bit_for_bit_and_take_the_stated_bits(name, grid, data):
    carrier = NAMED[name]
    block, size = carrier.format.block, carrier.format.size
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    group = data.draw(st.sampled_from([block, block * blocks]))
    steps = np.array(data.draw(st.lists(STEPS, min_size=(n := rows * blocks * block // group), max_size=n)))
    zeros = None
    if grid.low == 0:  # what a zero point makes of it: between all values above 0 and all below
        drawn = st.lists(st.integers(0, grid.high), min_size=n, max_size=n)
        zeros = np.array(data.draw(drawn), np.int16).reshape(rows, -1)
    x = tensor(grid, rows, blocks * block, group, steps, data.draw(st.integers(0, 99)), zeros)
    assert carrier.fits(x) is None
    raw = carrier.pack(x)
    assert raw.dtype == np.uint8
    assert raw.shape == (rows, blocks * size)
    assert raw.size * 8 == x.codes.size * carrier.format.bits
    exact(carrier.unpack(raw), x.values())


@pytest.mark.parametrize(("name", "grid"), [(n, g) for n, g in EVERY if n not in ("Q1_0", "Q2_0")])
def test_the_library_unpacks_the_same(name, grid):
    carrier, kind = NAMED[name], gguf.GGMLQuantizationType[name]
    assert kind.value == carrier.format.number
    assert gguf.GGML_QUANT_SIZES[kind] == (carrier.format.block, carrier.format.size)
    x = tensor(grid, 4, 512, 256, np.geomspace(1e-3, 3, 8).astype(np.float16))
    np.testing.assert_array_equal(gguf.dequantize(carrier.pack(x), kind), x.values())


def test_bits_of_the_types_that_the_library_does_not_unpack():
    """Q1_0 and Q2_0 read weight by weight, as they are described."""
    one, two = (tensor(GRIDS[name][0], 2, 128, 128, np.array([0.5, 3.0])) for name in ("Q1_0", "Q2_0"))
    for row, raw in enumerate(carriers.Q1_0.pack(one)):
        d = raw[:2].view(np.float16)[0].astype(float)
        assert [d if raw[2 + i // 8] >> i % 8 & 1 else -d for i in range(128)] == one.values()[row].tolist()
    for row, raw in enumerate(carriers.Q2_0.pack(two)):
        found = []
        for block in raw.reshape(2, 18):
            d = block[:2].view(np.float16)[0].astype(float)
            found += [((int(block[2 + i // 4]) >> 2 * (i % 4) & 3) - 1) * d for i in range(64)]
        assert found == two.values()[row].tolist()


@pytest.mark.parametrize("kind", layouts.FORMATS.values(), ids=lambda kind: kind.name)
def test_any_bytes_are_unpacked_as_the_library_does(kind):
    """Files of others, too: with scales within a block that an export never writes."""
    if kind.name in ("Q1_0", "Q2_0"):
        return
    raw = np.random.default_rng(0).integers(0, 256, (200, kind.size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected, found = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind.name]), kind.unpack(raw)
    np.testing.assert_array_equal(found, expected)


CHANNEL = PerChannel()
CHOSEN = [
    (Symmetric(bits=8), CHANNEL, "Q8_0"),
    (Symmetric(bits=7), CHANNEL, "Q8_0"),
    (Symmetric(bits=6), CHANNEL, "Q6_K"),
    (Symmetric(bits=6), PerGroup(size=64), "Q8_0"),
    (Symmetric(bits=5), CHANNEL, "Q5_0"),
    (Symmetric(bits=4), CHANNEL, "Q4_0"),
    (Symmetric(bits=4), PerGroup(size=32), "Q4_0"),
    (LSQ(bits=3), CHANNEL, "Q3_K"),
    (LSQ(bits=3), PerGroup(size=128), "Q4_0"),
    (Symmetric(bits=2), CHANNEL, "TQ2_0"),
    (Symmetric(bits=2), PerGroup(size=64), "Q2_0"),
    (Symmetric(bits=2), PerGroup(size=32), "Q4_0"),
    (SEQ(levels=4), CHANNEL, "Q2_K"),
    (Balanced(), CHANNEL, "Q2_K"),
    (Balanced(), PerGroup(size=128), "Q4_0"),
    (SEQ(levels=8), CHANNEL, "Q4_0"),
    (SEQ(levels=16), CHANNEL, "Q4_K"),
    (SEQ(levels=16), PerGroup(size=32), "Q5_0"),
    (SEQ(levels=3), CHANNEL, "TQ1_0"),
    (BitNet(), PerTensor(), "TQ1_0"),
    (BitNet(), PerGroup(size=128), "Q2_0"),
    (Binary(), CHANNEL, "Q1_0"),
    (Binary(), PerGroup(size=128), "Q1_0"),
    (Binary(), PerGroup(size=64), "Q2_0"),
    (Asymmetric(bits=2), CHANNEL, "Q2_K"),
    (Asymmetric(bits=3), CHANNEL, "Q4_K"),
    (Asymmetric(bits=4), CHANNEL, "Q4_K"),
]


def quantized(quantizer, granularity, shape=(3, 512), seed=0):
    """A tensor as `to_theirs` makes it, and the values of the training forward pass."""
    quantizer = dataclasses.replace(quantizer, granularity=granularity)
    axes = ("vocab", "embed")  # a table: its rows are outputs
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.1, jnp.float32)
    blocks = granularity.cut(shape, axes, "embed/table")
    blocked = w.reshape(blocks.blocked)
    own = (jnp.zeros(blocks.scales), quantizer.reference(blocked, blocks)) if quantizer.learned else (None, None)
    packed = Packed(quantizer.pack(w, blocks, *own), quantizer.grid, blocks, axes)
    size = kind_of(packed).group or shape[1]
    steps = reduced("x", spread(packed, packed.codes.steps), size)
    zeros = None if packed.codes.zeros is None else reduced("x", spread(packed, packed.codes.zeros), size)
    zeros = None if zeros is None else zeros.astype(np.int16)
    made = PackedTensor(np.asarray(packed.codes.codes), steps, zeros, packed.grid)
    return made, np.asarray(quantizer.fake(w, blocks, *own))


@pytest.mark.parametrize(("quantizer", "granularity", "name"), CHOSEN)
def test_the_smallest_type_that_holds_the_trained_values(quantizer, granularity, name):
    x, trained = quantized(quantizer, granularity)
    carrier = carrier_of("blk.0.ffn_up.weight", x)
    assert carrier.format.name == name
    exact(carrier.unpack(carrier.pack(x)), trained)


def test_types_are_tried_from_the_smallest():
    bits = [carrier.format.bits for carrier in CARRIERS]
    assert bits == sorted(bits) == [1.125, 1.6875, 2.0625, 2.25, 2.625, 3.4375, 4.25, 4.5, 4.5, 4.5, 5.5, 6.5625, 8.5]


def test_what_fits_nothing_is_refused_with_the_remedy():
    wide, _ = quantized(Symmetric(bits=4), PerGroup(size=16))
    coarse, _ = quantized(Symmetric(bits=4), PerChannel())
    narrow, _ = quantized(Symmetric(bits=4), PerChannel(), shape=(3, 48))
    zeros, _ = quantized(Asymmetric(bits=8), PerChannel())
    fine = coarse._replace(steps=coarse.steps * np.float32(1.0001))
    bounds = r"blk\.0\.ffn_up\.weight \[3, {}\], the codes -8 to 7, a scale for each {} of a row, fits no type of llama"
    symmetric = r"the codes 0 to 255 with zero points.* fits no type .*; quantize it to a symmetric grid of 2 to 8 bits"
    for x, message in (
        (wide, bounds.format(512, 16) + r".*needs a scale for each multiple of 32"),
        (narrow, bounds.format(48, 48) + r".*needs rows of a multiple of 32.*multiples of 256"),
        (zeros, symmetric),
        (fine, "needs scales that are float16.*scale_type='float16'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            carrier_of("blk.0.ffn_up.weight", x)
        assert "\n" not in str(error.value)


def test_scales_beyond_float16_do_not_fit():
    grid = Nearest(low=-8, high=7)
    for step, fits in ((2.0**-14, True), (65504.0, True), (65536.0, False), (1 + 2**-11, False), (2.0**-25, False)):
        x = tensor(grid, 1, 32, 32, np.array([step]))
        assert (carriers.Q4_0.fits(x) is None) == fits, step
        if not fits:
            assert carriers.Q4_0.fits(x) == "needs scales that are float16"
