"""How much of what a network learnt to believe: the validation part, which it has not been fitted to, says.

For each horizon two factors within [0, 1]: k on the departure of the mean from the drift, and b on the logarithm of the
width. Each is what the validation part likes best, less its standard error: such a part has only a few dozen samples of
a long horizon that do not overlap, and half of all chance departures look good in it.
"""

import numpy as np
import torch
from torch import Tensor

from mambakit.forecast.model import Distribution, MambaModel, pinball_loss
from mambakit.forecast.significance import overlapping_error

# Values of b that are tried, the most cautious first.
_WIDTH_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_shrinkage(
    departure: np.ndarray, residual: np.ndarray, horizon: int, days: np.ndarray | None = None
) -> float:
    """How much of a departure (samples,) to believe that meets residuals (samples,): from 0, nothing, to 1, all.

    The k that minimises sum (residual - k departure)^2, less its standard error.

    Args:
        days: (samples,) each sample's day, where several symbols have samples of the same day: what moves one of them
            moves the others, so they are averaged before the error is estimated. By default every sample has its own.
    """
    power = float((departure**2).mean())
    if power == 0.0:
        return 0.0
    best = float((departure * residual).mean()) / power
    error = overlapping_error(day_means(departure * (residual - best * departure), days), horizon) / power
    return min(max(best - error, 0.0), 1.0)


def choose_factor(costs: np.ndarray, horizon: int, days: np.ndarray | None = None) -> int:
    """Which column of costs (samples, factors), the most cautious first, is worth its risk.

    The cheapest, unless a more cautious one is within one standard error of it; days as in `measure_shrinkage`.
    """
    cheapest = int(costs.mean(axis=0).argmin())
    for column in range(cheapest):
        extra = day_means(costs[:, column] - costs[:, cheapest], days)
        if not extra.any() or extra.mean() <= overlapping_error(extra, horizon):
            return column
    return cheapest


def day_means(values: np.ndarray, days: np.ndarray | None) -> np.ndarray:
    """Means of values (samples,) over the samples of each day, in the order of time; the values, where days is None."""
    if days is None:
        return values
    _, place, counts = np.unique(days, return_inverse=True, return_counts=True)
    return np.bincount(place, values) / counts


def shrink_mean(
    model: MambaModel, forecast: Distribution, returns: Tensor, drift: Tensor, days: np.ndarray | None = None
) -> None:
    """Set k to what the validation part supports.

    Args:
        forecast: made with k = 1 for returns (samples, horizons).
        drift: (samples or 1, horizons), from which the mean departs.
        days: as in `measure_shrinkage`.
    """
    departure = ((forecast.mean - drift) / forecast.scale).double().numpy()
    residual = ((returns - drift) / forecast.scale).double().numpy()
    factors = [
        measure_shrinkage(departure[:, column], residual[:, column], horizon, days)
        for column, horizon in enumerate(model.config.prediction_horizons)
    ]
    model.shrinkage.copy_(torch.tensor(factors))


def shrink_width(
    model: MambaModel, forecast: Distribution, returns: Tensor, width: Tensor, days: np.ndarray | None = None
) -> None:
    """Set b likewise, by the pinball loss; width (samples, horizons) is exp(s), which the forecast was made with."""
    centre = forecast.mean[..., None]
    shape = (forecast.quantiles - centre) / width[..., None]
    costs = [
        pinball_loss(centre + shape * (width**factor)[..., None], returns).mean(dim=-1) / forecast.scale
        for factor in _WIDTH_FACTORS
    ]
    by_factor = torch.stack(costs, dim=-1).double().numpy()  # (samples, horizons, factors)
    chosen = [
        _WIDTH_FACTORS[choose_factor(by_factor[:, column], horizon, days)]
        for column, horizon in enumerate(model.config.prediction_horizons)
    ]
    model.width_shrinkage.copy_(torch.tensor(chosen))
