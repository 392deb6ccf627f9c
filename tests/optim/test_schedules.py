"""Learning-rate schedules against their formulas, written out independently in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.errors import UserError
from slmjax.optim.schedules import WSD, Constant, Cosine, InverseSqrt, Linear

pytestmark = pytest.mark.fast

LR = st.floats(1e-6, 10.0)
FRACTION = st.floats(0.0, 1.0)
RUN = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def values(schedule, steps, extra=5):
    return np.asarray(jax.jit(jax.vmap(schedule.build(steps)))(jnp.arange(steps + extra)))


def reference(peak, warmup, decay, steps, extra=5):
    return [peak * (s + 1) / warmup if s < warmup else decay(s) for s in range(steps + extra)]


def progress(s, start, end):
    return min(1.0, (s - start) / max(end - start, 1))


@settings(deadline=None, max_examples=25)
@given(run=RUN, peak=LR, final=FRACTION)
def test_linear(run, peak, final):
    steps, warmup = run
    want = reference(peak, warmup, lambda s: peak * (1 - (1 - final) * progress(s, warmup, steps)), steps)
    got = values(Linear(peak_lr=peak, warmup_steps=warmup, final_fraction=final), steps)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * peak)


@settings(deadline=None, max_examples=25)
@given(run=RUN, peak=LR, final=FRACTION)
def test_cosine(run, peak, final):
    steps, warmup = run

    def decay(s):
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress(s, warmup, steps))) / 2)

    got = values(Cosine(peak_lr=peak, warmup_steps=warmup, final_fraction=final), steps)
    np.testing.assert_allclose(got, reference(peak, warmup, decay, steps), rtol=1e-5, atol=1e-6 * peak)


@settings(deadline=None, max_examples=25)
@given(run=RUN, peak=LR, final=FRACTION, power=st.floats(0.25, 3.0), part=FRACTION)
def test_wsd(run, peak, final, power, part):
    steps, warmup = run
    fraction = part * (steps - warmup) / steps
    length = round(fraction * steps)

    def decay(s):
        gone = min(1.0, max(0, s - (steps - length)) / max(length, 1))
        return peak * (1 - (1 - final) * gone**power)

    schedule = WSD(peak_lr=peak, warmup_steps=warmup, decay_fraction=fraction, final_fraction=final, power=power)
    np.testing.assert_allclose(
        values(schedule, steps), reference(peak, warmup, decay, steps), rtol=1e-5, atol=1e-5 * peak
    )


@settings(deadline=None, max_examples=25)
@given(run=RUN, peak=LR)
def test_inverse_sqrt(run, peak):
    steps, warmup = run
    want = [peak * min((s + 1) / max(warmup, 1), math.sqrt(max(warmup, 1) / (s + 1))) for s in range(steps + 5)]
    got = values(InverseSqrt(peak_lr=peak, warmup_steps=warmup), steps)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * peak)


@settings(deadline=None, max_examples=25)
@given(run=RUN, peak=LR)
def test_constant(run, peak):
    steps, warmup = run
    got = values(Constant(peak_lr=peak, warmup_steps=warmup), steps)
    np.testing.assert_allclose(got, reference(peak, warmup, lambda s: peak, steps), rtol=1e-5, atol=1e-6 * peak)


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, WSD, InverseSqrt])
def test_first_step_moves_and_the_peak_is_reached_at_the_end_of_the_warmup(kind):
    got = values(kind(peak_lr=2.0, warmup_steps=10), 100)
    np.testing.assert_allclose(got[[0, 9]], [0.2, 2.0], rtol=1e-6)
    assert got.max() <= 2.0 * (1 + 1e-6)
    assert got[99] > 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Cosine(peak_lr=1e-3, warmup_steps=11).build(10), "warmup_steps is 11, longer than the run of 10"),
        (lambda: Cosine(peak_lr=0.0), "peak_lr is 0.0"),
        (lambda: Linear(peak_lr=math.nan), "peak_lr is nan"),
        (lambda: Linear(peak_lr=1.0, warmup_steps=-1), "warmup_steps is -1"),
        (lambda: Linear(peak_lr=1.0, final_fraction=1.5), "final_fraction is 1.5"),
        (lambda: WSD(peak_lr=1.0, decay_fraction=-0.1), "decay_fraction is -0.1"),
        (lambda: WSD(peak_lr=1.0, power=0.0), "power is 0.0"),
        (lambda: WSD(peak_lr=1.0, warmup_steps=9, decay_fraction=0.5).build(10), "lower one of them"),
    ],
)
def test_mistakes_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
