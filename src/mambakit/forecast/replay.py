"""The test part forecast day by day, as if the model had served then: a log to monitor before the first live day."""

from collections.abc import Iterator

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.forecast.artefact import SavedForecaster
from mambakit.forecast.dataset import raw_features
from mambakit.forecast.prediction_log import LogEntry, PredictionLog
from mambakit.forecast.predictor import Forecast
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.quality import require_quality
from mambakit.forecast.registry import PRODUCTION
from mambakit.forecast.volatility import ewma_volatility

_WINDOWS_AT_ONCE = 256


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
    first_day = np.datetime64(saved.metadata["data_stats"]["origins"]["test"][0])
    rows = np.flatnonzero(series.dates >= first_day)
    if not len(rows) or rows[0] < config.sequence_length:
        raise DataError(
            f"{series.symbol}: these prices, {series.dates[0]} to {series.dates[-1]}, do not reach from "
            f"{config.sequence_length} days before the test part of {version} ({first_day}) into it"
        )
    require_quality(series, min_samples=config.sequence_length)
    raw = raw_features(series, config)
    scaled = torch.from_numpy(saved.scaler.transform(raw))
    volatility = ewma_volatility(series.prices)
    window = torch.arange(1 - config.sequence_length, 1)
    drift = saved.model.drift.double().numpy()
    for some in np.array_split(rows, -(-len(rows) // _WINDOWS_AT_ONCE)):
        with torch.no_grad():
            distribution = saved.model(
                scaled[torch.from_numpy(some)[:, None] + window], torch.from_numpy(volatility[some].astype(np.float32))
            )
        means, quantiles = distribution.mean.double().numpy(), distribution.quantiles.double().numpy()
        for row, mean, spread in zip(some, means, quantiles, strict=True):
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
                features=raw[row],
            )
