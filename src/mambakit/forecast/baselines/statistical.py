"""Exponential smoothing and ARIMA, as statsforecast chooses them, on log prices.

Chosen and fitted once, on the training part; then the fitted model runs forward to each origin with its parameters
fixed (`forward`), seeing every price up to that day. The forecast of a log price, less the last one, is that of the
log return; its distribution is normal, with the variance of the model's own intervals.
"""

import warnings
from typing import Any

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.baselines.walks import training_days
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions, normal_predictions

_HALF_WIDTH = 1.2815515655446004  # of a normal's 80% interval, in standard deviations


def ets(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """AutoETS without seasons: error, trend and damping by AICc."""
    from statsforecast.models import AutoETS

    return _run_forward(AutoETS(model="ZZN"), prepared, samples)


def arima(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """AutoARIMA without seasons, up to three autoregressive and moving-average terms, by AICc."""
    from statsforecast.models import AutoARIMA

    return _run_forward(AutoARIMA(seasonal=False, max_p=3, max_q=3, approximation=True), prepared, samples)


def _run_forward(model: Any, prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    logs, days = np.log(prepared.series.prices), training_days(prepared)
    horizons = np.array(prepared.config.prediction_horizons)
    mean, deviation = (np.empty((len(samples), len(horizons))) for _ in range(2))
    with warnings.catch_warnings():  # of searches that tried a model that did not converge, and took another
        warnings.simplefilter("ignore")
        model.fit(logs[days])
        for place, origin in enumerate(prepared.origins[samples]):
            ahead = model.forward(logs[days.start : origin + 1], h=int(horizons[-1]), level=[80])
            upper, centre = np.asarray(ahead["hi-80"])[horizons - 1], np.asarray(ahead["mean"])[horizons - 1]
            mean[place] = centre - logs[origin]
            deviation[place] = (upper - centre) / _HALF_WIDTH
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
        raise DataError(f"{type(model).__name__} gave forecasts that are not finite")
    return normal_predictions(mean, deviation)
