"""Baselines that forecast no more than the drift: what differs is how wide they think the future is."""

import numpy as np

from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions, normal_predictions


def random_walk(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """Mean 0, normal with the root mean square of the training part's returns of that horizon."""
    known = prepared.returns[prepared.split.training]
    deviation = np.sqrt((known**2).mean(axis=0))
    return normal_predictions(_every_day(np.zeros_like(deviation), samples), _every_day(deviation, samples))


def drift(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """The training part's mean return of that horizon, normal with its standard deviation."""
    known = prepared.returns[prepared.split.training]
    return normal_predictions(_every_day(known.mean(axis=0), samples), _every_day(known.std(axis=0), samples))


def ewma_walk(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """Mean 0, normal with today's EWMA volatility times the square root of the horizon."""
    scale = volatility_at(prepared, samples)
    return normal_predictions(np.zeros_like(scale), scale)


def ewma(prepared: PreparedSeries, samples: np.ndarray) -> Predictions:
    """The drift, and the training part's quantiles in units of that day's EWMA volatility."""
    known = prepared.split.training
    centre = prepared.returns[known].mean(axis=0)
    standardised = (prepared.returns[known] - centre) / volatility_at(prepared, known)
    shape = np.quantile(standardised, QUANTILES, axis=0).T  # (horizons, quantiles)
    mean = _every_day(centre, samples)
    return Predictions(mean, mean[..., None] + volatility_at(prepared, samples)[..., None] * shape)


def volatility_at(prepared: PreparedSeries, samples: np.ndarray) -> np.ndarray:
    """EWMA volatility at the origins of these samples, carried to each horizon: (samples, horizons)."""
    return prepared.volatility[prepared.origins[samples]][:, None] * np.sqrt(prepared.config.prediction_horizons)


def training_days(prepared: PreparedSeries) -> slice:
    """Days whose prices the training part has seen, from its first window to its last origin."""
    origins, training = prepared.origins, prepared.split.training
    first = 0 if training[0] == 0 else origins[training[0]] - prepared.config.sequence_length + 1
    return slice(int(first), int(origins[training[-1]]) + 1)


def _every_day(values: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return np.tile(values, (len(samples), 1))
