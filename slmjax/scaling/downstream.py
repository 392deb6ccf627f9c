"""From compute to loss to a downstream score: a sigmoid of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmjax.errors import UserError
from slmjax.scaling.criterion import SQUARED
from slmjax.scaling.estimated import Estimated, from_draws
from slmjax.scaling.fit import predictions
from slmjax.scaling.solve import minimise
from slmjax.scaling.uncertainty import Bootstrap


@dataclass(frozen=True)
class Link:
    """score = chance + (best - chance) / (1 + exp(slope (loss - middle))): from chance at a high loss up to `best`.

    Attributes:
        theta: best, ln slope, middle, [3].
        draws: of the bootstrap over runs, [B, 3].
        chance: the score of guessing.
    """

    theta: np.ndarray
    draws: np.ndarray
    chance: float

    def score(self, loss: np.ndarray | float) -> np.ndarray:
        return _score(self.theta[None], np.atleast_1d(loss), self.chance)[0][0]


def link(loss: np.ndarray, score: np.ndarray, *, chance: float = 0.0, draws: int = 300, seed: int = 0) -> Link:
    """Fits the sigmoid by least squares; runs without a score (nan) are left out.

    Args:
        loss, score: of the runs, [n]; scores between 0 and 1.

    Raises:
        UserError: fewer than four runs have a score, or a score is not between 0 and 1.
    """
    known = np.isfinite(score)
    loss, score = loss[known], score[known]
    if len(loss) < 4:
        raise UserError(f"metric: {len(loss)} runs have one; a sigmoid of the loss needs 4")
    if score.min() < 0 or score.max() > 1 or not 0 <= chance < 1:
        raise UserError(f"metric: scores of {score.min():g} to {score.max():g}, chance {chance:g}; expected 0 to 1")

    def residuals(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted, jacobian = _score(theta, loss, chance)
        return predicted - score, jacobian

    low, high = np.array([chance, -5.0, 0.0]), np.array([1.0, 7.0, 2 * loss.max()])
    middles, slopes = np.quantile(loss, [0.1, 0.5, 0.9]), np.log([1.0, 4.0, 16.0])
    start = np.asarray([[best, slope, middle] for best in (1.0, 0.8) for slope in slopes for middle in middles])
    found = minimise(residuals, start, SQUARED, weights=np.ones(len(loss)), low=low, high=high)
    theta = found.theta[int(np.argmin(found.objective))]
    weights = np.random.default_rng(seed).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), size=draws)
    again = minimise(residuals, np.tile(theta, (draws, 1)), SQUARED, weights=weights.astype(float), low=low, high=high)
    return Link(theta, again.theta, chance)


def predict_score(draws: Bootstrap, of: Link, **columns: np.ndarray | float) -> Estimated:
    """The score at these quantities, through the predicted loss, with the interval of both fits together."""
    best = float(of.score(draws.fitted.predict(columns))[0])
    losses = predictions(draws.fitted.law, draws.theta, columns)
    which = np.random.default_rng(draws.seed).integers(len(of.draws), size=len(losses))
    scores = np.concatenate(
        [_score(of.draws[i][None], loss, of.chance)[0][0] for i, loss in zip(which, losses, strict=True)]
    )
    return from_draws(best, scores, draws.level)


def _score(theta: np.ndarray, loss: np.ndarray, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B, n] and their derivatives [B, n, 3]."""
    best, slope, middle = theta[:, 0, None], np.exp(theta[:, 1, None]), theta[:, 2, None]
    x = slope * (loss - middle)
    share = 1 / (1 + np.exp(np.clip(x, -700, 700)))
    steep = -(best - chance) * share * (1 - share)
    return chance + (best - chance) * share, np.stack([share, steep * x, -steep * slope * np.ones_like(x)], -1)
