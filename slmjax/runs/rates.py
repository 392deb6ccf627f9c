"""The learning rates of a run, looked at as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Experiment


def rates(experiment: Experiment) -> np.ndarray:
    """The learning rate of each update, float32 [steps].

    Raises:
        UserError: the schedule does not fit into the steps.
    """
    curve = experiment.schedule.build(experiment.steps)
    return np.asarray(jax.vmap(lambda step: jnp.asarray(curve(step), jnp.float32))(jnp.arange(experiment.steps)))


def fall(rate: np.ndarray) -> int | None:
    """The number of updates before the learning rate first falls from a plateau; None if it does not. A run can be
    continued from there with more steps, as if it had had them from the beginning."""
    top = np.flatnonzero(rate == rate.max())
    after = int(top[-1]) + 1
    return after if len(top) > 2 and after < len(rate) else None


def parting(before: np.ndarray, after: np.ndarray) -> int:
    """The number of updates that two runs have in common: those with the same learning rate, from the first on."""
    shorter = min(len(before), len(after))
    apart = np.flatnonzero(before[:shorter] != after[:shorter])
    return int(apart[0]) if len(apart) else shorter


def jump(before: Experiment, after: Experiment, done: int) -> str | None:
    """How the learning rate would change if a run that has made `done` updates went on as `after`; None if it would
    not, or there is no further step."""
    if not 0 < done < after.steps:
        return None
    old, new = rates(before), float(rates(after)[done])
    last = float(old[min(done, len(old)) - 1])
    expected = float(old[done]) if done < len(old) else last
    if new == expected:
        return None
    return f"the learning rate goes from {last:.3g} at step {done} to {new:.3g} at step {done + 1}"
