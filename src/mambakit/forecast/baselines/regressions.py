"""Baselines that forecast a direction, with the quantiles of their training residuals around it."""

import numpy as np

from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions

MOMENTUM_DAYS = 20
RIDGE_PENALTIES = tuple(10.0**power for power in range(1, 8))  # the largest leaves nothing but the drift


def momentum(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """The mean daily log return of the last 20 days goes on to every horizon."""
    logs = np.log(prepared.series.prices)

    def mean(at: np.ndarray) -> np.ndarray:
        days = prepared.origins[at]
        daily = (logs[days] - logs[days - MOMENTUM_DAYS]) / MOMENTUM_DAYS
        return daily[:, None] * np.array(prepared.config.prediction_horizons)

    return _with_residuals(prepared, mean(prepared.split.training), mean(samples))


def ridge(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """Linear in the features of the origin's day alone: on whole windows it is worse on every built-in symbol."""
    from sklearn.linear_model import Ridge

    split, last_rows = prepared.split, prepared.features[prepared.origins].astype(np.float64)
    returns = prepared.returns
    least = np.full(returns.shape[1], np.inf)
    best, best_known = (np.empty((len(part), returns.shape[1])) for part in (samples, split.training))
    for penalty in RIDGE_PENALTIES:
        fitted = Ridge(alpha=penalty).fit(last_rows[split.training], returns[split.training])
        loss = ((returns[split.validation] - fitted.predict(last_rows[split.validation])) ** 2).mean(axis=0)
        better = loss < least
        best[:, better] = fitted.predict(last_rows[samples])[:, better]
        best_known[:, better] = fitted.predict(last_rows[split.training])[:, better]
        least = np.minimum(least, loss)
    return _with_residuals(prepared, best_known, best)


def _with_residuals(prepared: PreparedSeries, known: np.ndarray, mean: np.ndarray) -> Predictions:
    residuals = prepared.returns[prepared.split.training] - known
    return Predictions(mean, mean[..., None] + np.quantile(residuals, QUANTILES, axis=0).T)
