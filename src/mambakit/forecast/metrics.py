"""The scores of a forecast: pure functions on arrays of one horizon, each with its equation and its source.

r is the log return that came, f its forecast mean, q_k the forecast quantile at level p_k; means are over samples.
"""

from collections.abc import Sequence

import numpy as np

from mambakit.forecast.predictions import interval_columns


def r2_out_of_sample(actual: np.ndarray, mean: np.ndarray, reference: np.ndarray) -> float:
    """1 - sum (r - f)^2 / sum (r - f_ref)^2: above 0, better than the reference.

    Arrays (samples,). Source: Campbell and Thompson, Review of Financial Studies 21 (2008), equation 1.
    """
    return float(1.0 - ((actual - mean) ** 2).sum() / ((actual - reference) ** 2).sum())


def mase(actual: np.ndarray, mean: np.ndarray, usual_change: np.ndarray | float) -> float:
    """mean |r - f| / mean |r of the training part|, for the same horizon: 1 is what "no change" scored there.

    Arrays (samples,); the denominator may differ from fold to fold. Source: Hyndman and Koehler, International
    Journal of Forecasting 22 (2006), section 3, with the seasonal lag replaced by the horizon.
    """
    return float(np.abs(actual - mean).mean() / np.mean(usual_change))


def smape(actual: np.ndarray, mean: np.ndarray) -> float:
    """mean 2 |P - F| / (P + F) of the price P = e^r and its forecast F = e^f, which is mean 2 tanh(|r - f| / 2).

    The price itself cancels, so this is very nearly the mean absolute error of the log return; on log returns
    themselves the usual formula gives 2 to whoever forecasts 0. Source: Makridakis, International Journal of
    Forecasting 9 (1993), in the form of the M3 competition.
    """
    return float(2.0 * np.tanh(np.abs(actual - mean) / 2.0).mean())


def pinball(quantiles: np.ndarray, actual: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """max(p (r - q), (p - 1) (r - q)) of each quantile: (..., levels) and (...) to (..., levels).

    Source: Koenker and Bassett, Econometrica 46 (1978).
    """
    p = np.asarray(levels)
    error = actual[..., None] - quantiles
    return np.maximum(p * error, (p - 1.0) * error)


def crps(quantiles: np.ndarray, actual: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """CRPS = 2 int_0^1 pinball_p dp of each sample, by the trapezoid rule over the levels: (..., levels) to (...).

    The pinball loss of a distribution with a mean falls to 0 at both ends, which close the rule. With the 21 levels of
    `config.QUANTILES` a normal's is 0.3% too low. Source: Gneiting and Ranjan, Journal of Business and Economic
    Statistics 29 (2011), equation 5.
    """
    p = np.concatenate([[0.0], levels, [1.0]])
    weights = (p[2:] - p[:-2]) / 2.0
    return 2.0 * (pinball(quantiles, actual, levels) * weights).sum(axis=-1)


def interval_score(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray, level: float) -> np.ndarray:
    """Width + 2 / (1 - level) * the distance by which r missed the interval, of each sample; lower is better.

    Source: Gneiting and Raftery, Journal of the American Statistical Association 102 (2007), equation 43.
    """
    missed = np.maximum(lower - actual, 0.0) + np.maximum(actual - upper, 0.0)
    return upper - lower + 2.0 / (1.0 - level) * missed


def covered(quantiles: np.ndarray, actual: np.ndarray, levels: Sequence[float], level: float) -> np.ndarray:
    """Whether r is within the central interval of this level, ends included: (..., levels) and (...) to bool (...)."""
    low, high = interval_columns(level, levels)
    return (quantiles[..., low] <= actual) & (actual <= quantiles[..., high])
