"""The forecasters to beat. Each is fitted on the training part alone and forecasts the log return of every horizon.

- random walk: nothing changes, mean 0.
- drift: the training part's mean return of that horizon.
- momentum: the mean daily return of the last 20 days goes on.
- ridge: a linear map from the origin's standardised features, its penalty for each horizon chosen on the validation
  part. (On whole windows, flattened, it is worse on the validation part of every built-in symbol.)

- ewma: the drift, with intervals as wide as today's EWMA volatility asks for; it is the network before its training,
  so what the network's intervals gain on it is what was learnt.

The first two give 80% intervals as well: normal, with the training part's constant volatility.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mambakit.forecast.dataset import PreparedSeries

BASELINES = ("random walk", "drift", "ewma", "momentum", "ridge")
MOMENTUM_DAYS = 20
RIDGE_PENALTIES = tuple(10.0**power for power in range(1, 8))  # the largest leaves nothing but the drift


@dataclass(frozen=True)
class PointForecast:
    """Mean log returns (samples, horizons) of one forecaster and, where it has one, its 80% interval."""

    mean: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


def baseline_forecasts(prepared: PreparedSeries, samples: np.ndarray) -> dict[str, PointForecast]:
    """Forecasts of every baseline for the samples at these positions, in the order of BASELINES."""
    makers: dict[str, Callable[[PreparedSeries, np.ndarray], PointForecast]] = {
        "random walk": _random_walk,
        "drift": _drift,
        "ewma": _ewma,
        "momentum": _momentum,
        "ridge": _ridge,
    }
    return {name: makers[name](prepared, samples) for name in BASELINES}


def _random_walk(prepared: PreparedSeries, samples: np.ndarray) -> PointForecast:
    return _with_constant_interval(prepared, np.zeros((len(samples), prepared.returns.shape[1])))


def _drift(prepared: PreparedSeries, samples: np.ndarray) -> PointForecast:
    mean = prepared.returns[prepared.split.training].mean(axis=0)
    return _with_constant_interval(prepared, np.tile(mean, (len(samples), 1)))


def _with_constant_interval(prepared: PreparedSeries, mean: np.ndarray) -> PointForecast:
    deviation = prepared.returns[prepared.split.training].std(axis=0)
    half = NormalDist().inv_cdf(0.9) * deviation
    return PointForecast(mean, mean - half, mean + half)


def _ewma(prepared: PreparedSeries, samples: np.ndarray) -> PointForecast:
    known = prepared.split.training
    drift = prepared.returns[known].mean(axis=0)
    scale = prepared.volatility[prepared.origins][:, None] * np.sqrt(prepared.config.prediction_horizons)
    lower, upper = np.quantile((prepared.returns[known] - drift) / scale[known], (0.1, 0.9), axis=0)
    mean = np.tile(drift, (len(samples), 1))
    return PointForecast(mean, mean + scale[samples] * lower, mean + scale[samples] * upper)


def _momentum(prepared: PreparedSeries, samples: np.ndarray) -> PointForecast:
    logs = np.log(prepared.series.prices)
    days = prepared.origins[samples]
    daily = (logs[days] - logs[days - MOMENTUM_DAYS]) / MOMENTUM_DAYS
    return PointForecast(daily[:, None] * np.array(prepared.config.prediction_horizons))


def _ridge(prepared: PreparedSeries, samples: np.ndarray) -> PointForecast:
    from sklearn.linear_model import Ridge

    split, last_rows = prepared.split, prepared.features[prepared.origins].astype(np.float64)
    returns = prepared.returns
    least = np.full(returns.shape[1], np.inf)
    best = np.empty((len(samples), returns.shape[1]))
    for penalty in RIDGE_PENALTIES:
        ridge = Ridge(alpha=penalty).fit(last_rows[split.training], returns[split.training])
        loss = ((returns[split.validation] - ridge.predict(last_rows[split.validation])) ** 2).mean(axis=0)
        better = loss < least
        best[:, better] = ridge.predict(last_rows[samples])[:, better]
        least = np.minimum(least, loss)
    return PointForecast(best)
