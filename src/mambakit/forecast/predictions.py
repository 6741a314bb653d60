"""What any forecaster says of some samples: a mean and quantiles of every horizon's log return.

Model and baselines speak this one form, so that one set of scores judges them all. Between its quantiles a
distribution is read on a normal probability plot,

    F(x) = Phi(z),   z linear in x between the points (q_k, Phi^-1(p_k)), and on along the outermost two beyond them,

which is exact for a normal distribution at every x and needs no guess about where a linear cdf ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.config import QUANTILES

_NARROWEST = 1e-12  # between neighbouring quantiles, in log return: equal ones must not divide by zero


@dataclass(frozen=True)
class Predictions:
    """One forecaster's distributions of the log return for some samples."""

    mean: np.ndarray  # (samples, horizons)
    quantiles: np.ndarray  # (samples, horizons, len(QUANTILES)), increasing

    def __post_init__(self) -> None:
        if self.quantiles.shape != (*self.mean.shape, len(QUANTILES)):
            raise DataError(
                f"quantiles must have the shape of the mean and {len(QUANTILES)} levels, "
                f"{(*self.mean.shape, len(QUANTILES))}, got {self.quantiles.shape}"
            )

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds (samples, horizons) of the central interval; raises DataError for an odd level."""
        low, high = interval_columns(level, QUANTILES)
        return self.quantiles[..., low], self.quantiles[..., high]

    def __getitem__(self, samples: np.ndarray | slice) -> "Predictions":
        return Predictions(self.mean[samples], self.quantiles[samples])


def normal_predictions(mean: np.ndarray, deviation: np.ndarray) -> Predictions:
    """Normal distributions with these means and standard deviations, each (samples, horizons)."""
    return Predictions(mean, mean[..., None] + deviation[..., None] * _normal_quantiles(QUANTILES))


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of consecutive samples as one."""
    return Predictions(
        np.concatenate([part.mean for part in parts]), np.concatenate([part.quantiles for part in parts])
    )


def interval_columns(level: float, levels: Sequence[float]) -> tuple[int, int]:
    """Where among the levels the bounds of a central interval stand; raises DataError where they do not."""
    rounded = [round(each, 6) for each in levels]
    low, high = round((1 - level) / 2, 6), round((1 + level) / 2, 6)
    if low not in rounded or high not in rounded:
        raise DataError(f"a {level:.0%} interval needs the quantiles {low:g} and {high:g}, which were not forecast")
    return rounded.index(low), rounded.index(high)


def pit(quantiles: np.ndarray, actual: np.ndarray, levels: Sequence[float] = QUANTILES) -> np.ndarray:
    """F(actual), the probability integral transform: quantiles (..., levels) and actual (...) to (...) in [0, 1]."""
    from scipy.special import ndtr  # not above: serving a forecast does not wait for scipy

    z = _normal_quantiles(levels)
    # The last quantile at or below the value, kept so that a right neighbour exists.
    left = np.clip((quantiles <= actual[..., None]).sum(axis=-1) - 1, 0, len(z) - 2)[..., None]
    low = np.take_along_axis(quantiles, left, axis=-1)[..., 0]
    high = np.take_along_axis(quantiles, left + 1, axis=-1)[..., 0]
    below, above = z[left[..., 0]], z[left[..., 0] + 1]
    share = (actual - low) / np.maximum(high - low, _NARROWEST)
    return ndtr(below + share * (above - below))


def quantiles_at(quantiles: np.ndarray, probabilities: np.ndarray, levels: Sequence[float] = QUANTILES) -> np.ndarray:
    """The inverse of `pit`: quantiles (..., levels) read at probabilities (..., wanted) in (0, 1): (..., wanted)."""
    from scipy.special import ndtri

    z, at = _normal_quantiles(levels), ndtri(probabilities)
    left = np.clip(np.searchsorted(z, at, side="right") - 1, 0, len(z) - 2)
    low, high = (np.take_along_axis(quantiles, left + step, axis=-1) for step in (0, 1))
    share = (at - z[left]) / (z[left + 1] - z[left])
    return low + share * (high - low)


def _normal_quantiles(levels: Sequence[float]) -> np.ndarray:
    return np.array([NormalDist().inv_cdf(level) for level in levels])
