"""A replayed forecast is the one that the model would have served on that day."""

from pathlib import Path

import numpy as np
import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import DataError
from mambakit.forecast.artefact import SavedForecaster
from mambakit.forecast.prediction_log import PredictionLog
from mambakit.forecast.predictor import forecast_series
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.replay import replay, replayed_entries

SERIES = random_walk(memory=0.7)


def test_each_day_is_forecast_from_its_own_past_alone(saved: SavedForecaster) -> None:
    entries = list(replayed_entries(saved, SERIES, "v1", "production"))
    for entry in (entries[0], entries[31], entries[-1]):
        day = int(np.flatnonzero(SERIES.dates == entry.forecast.as_of)[0])
        past = PriceSeries("WALK", SERIES.dates[: day + 1], SERIES.prices[: day + 1], SERIES.volumes[: day + 1])
        served = forecast_series(saved, past)
        np.testing.assert_allclose(entry.forecast.mean, served.mean, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(entry.forecast.quantiles, served.quantiles, rtol=1e-4, atol=1e-7)
        assert entry.forecast.current_price == served.current_price
        np.testing.assert_array_equal(entry.forecast.drift, served.drift)


def test_the_days_are_those_since_the_test_part_began(saved: SavedForecaster, tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "log.sqlite")
    first = saved.metadata["data_stats"]["origins"]["test"][0]
    days = int((SERIES.dates >= np.datetime64(first)).sum())
    assert replay(saved, SERIES, log, "v1") == days
    assert replay(saved, SERIES, log, "v1") == 0
    logged = log.forecasts("WALK", "v1", saved.metadata["training_date"])
    assert (str(logged.as_of[0]), logged.as_of[-1]) == (first, SERIES.dates[-1])
    assert not log.frame().shown.any()
    assert log.frame().replayed.all()


def test_prices_that_end_before_the_test_part_are_refused(saved: SavedForecaster) -> None:
    early = PriceSeries("WALK", SERIES.dates[:200], SERIES.prices[:200], SERIES.volumes[:200])
    with pytest.raises(DataError, match="do not reach from 120 days before the test part of v1"):
        list(replayed_entries(saved, early, "v1", "production"))
