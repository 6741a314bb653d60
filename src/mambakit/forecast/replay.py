"""The test part forecast day by day, as if the model had served then: a log to monitor before the first live day."""

from collections.abc import Iterator

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.artefact import SavedForecaster
from mambakit.forecast.dataset import days_with_prices, raw_features, shortest_history
from mambakit.forecast.prediction_log import LogEntry, PredictionLog
from mambakit.forecast.predictor import Forecast, distributions_after
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.registry import PRODUCTION
from mambakit.forecast.volatility import ewma_volatility


def replay(saved: SavedForecaster, series: PriceSeries, log: PredictionLog, version: str, arm: str = PRODUCTION) -> int:
    """Log the forecast of every day from the test part's first to the series' last; return how many were new.

    Each sees only its own past, and the model was trained before all of them.

    Raises:
        DataError: the series is not usable, or ends before the test part.
    """
    return log.append(replayed_entries(saved, series, version, arm))


def replayed_entries(saved: SavedForecaster, series: PriceSeries, version: str, arm: str) -> Iterator[LogEntry]:
    """The forecasts that `replay` logs, oldest first."""
    config = saved.config
    series, _ = days_with_prices(series, None, shortest_history(config))
    first_day = np.datetime64(saved.metadata["data_stats"]["origins"]["test"][0])
    rows = np.flatnonzero(series.dates >= first_day)
    if not len(rows) or rows[0] + 1 < shortest_history(config):
        raise DataError(
            f"{series.symbol}: these prices, {series.dates[0]} to {series.dates[-1]}, do not reach from "
            f"{shortest_history(config)} days before the test part of {version} ({first_day}) into it"
        )
    volatility, features = ewma_volatility(series.prices), raw_features(series, config)
    distribution = distributions_after(saved.model, saved.scaler, series, rows)
    means, quantiles = distribution.mean.double().numpy(), distribution.quantiles.double().numpy()
    drift = saved.model.drift[0].double().numpy()
    for row, mean, spread in zip(rows, means, quantiles, strict=True):
        forecast = Forecast(
            symbol=series.symbol,
            version=version,
            as_of=series.dates[row],
            current_price=float(series.prices[row]),
            horizons=config.prediction_horizons,
            mean=mean,
            quantiles=spread,
            drift=drift,
        )
        yield LogEntry(
            forecast,
            trained_at=saved.metadata["training_date"],
            arm=arm,
            shown=False,
            replayed=True,
            volatility=float(volatility[row]),
            features=features[row],
        )
