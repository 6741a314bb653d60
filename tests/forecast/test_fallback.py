"""The forecast that needs no model answers from two prices on, and is never wilder than its data."""

import numpy as np
import pytest
from tests.forecast.walks import random_walk

from mambakit.errors import DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.fallback import BELIEF, FallbackForecaster, cautious_volatility, daily_drift
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.volatility import ewma_volatility


def series_of(prices: np.ndarray) -> PriceSeries:
    return PriceSeries("WALK", np.arange(len(prices)).astype("datetime64[D]"), prices, np.zeros(len(prices)))


def test_the_mean_lies_between_drift_and_momentum_near_the_drift() -> None:
    rise = np.concatenate([np.zeros(400), np.full(20, 0.01)])  # momentum of 1% a day after a long rest
    forecast = FallbackForecaster((1, 10)).forecast(series_of(np.exp(np.cumsum(rise))))
    drift = 0.2 / (419 + 250)
    np.testing.assert_allclose(forecast.drift, [drift, 10 * drift])
    np.testing.assert_allclose(forecast.mean, np.array([1, 10]) * (drift + BELIEF * (0.01 - drift)))


def test_quantiles_are_normal_around_the_mean_and_grow_with_the_root_of_time() -> None:
    forecast = FallbackForecaster((1, 4)).forecast(random_walk())
    assert forecast.quantiles.shape == (2, len(QUANTILES))
    assert (np.diff(forecast.quantiles, axis=1) > 0).all()
    np.testing.assert_allclose(forecast.quantiles[:, QUANTILES.index(0.5)], forecast.mean)
    width = forecast.quantiles[:, -1] - forecast.quantiles[:, 0]
    np.testing.assert_allclose(width, 2 * 1.959964 * cautious_volatility(random_walk().prices) * np.array([1, 2]))


def test_two_prices_are_enough_and_one_is_not() -> None:
    forecast = FallbackForecaster().forecast(series_of(np.array([10.0, 11.0])))
    assert np.abs(forecast.mean).max() < 0.05  # a single jump of 10% says next to nothing about 30 days
    low, high = forecast.intervals(0.8)["1d"]
    assert 0.95 * 11 < low < 11 < high < 1.05 * 11
    with pytest.raises(DataError, match="WALK: 1 usable price; even the fallback forecast needs 2"):
        FallbackForecaster().forecast(series_of(np.array([10.0])))


def test_a_long_history_decides_alone_about_the_volatility() -> None:
    prices = random_walk().prices
    assert cautious_volatility(prices) == pytest.approx(ewma_volatility(prices)[-1], rel=1e-6)


def test_the_drift_of_a_short_history_is_believed_less() -> None:
    assert daily_drift(np.exp(0.01 * np.arange(11))) == pytest.approx(0.1 / 260)
    assert daily_drift(np.exp(0.01 * np.arange(5001))) == pytest.approx(0.01, rel=0.05)


def test_prices_follow_the_current_price() -> None:
    forecast = FallbackForecaster().forecast(random_walk(), current_price=1.0)
    assert forecast.prices()["1d"] == pytest.approx(float(np.exp(forecast.mean[0])))
