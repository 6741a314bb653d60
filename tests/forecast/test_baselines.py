"""The baselines: each against its definition, and none of them aware of the test part."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mambakit.forecast.baselines import BASELINES, RIDGE_PENALTIES, baseline_forecasts
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.train import forecast_samples, untrained_model


@pytest.fixture
def forecasts(prepared):
    return baseline_forecasts(prepared, prepared.split.test)


def test_every_baseline_forecasts_every_sample_and_horizon(prepared, forecasts) -> None:
    assert tuple(forecasts) == BASELINES
    for forecast in forecasts.values():
        assert forecast.mean.shape == (len(prepared.split.test), 4)
        assert np.isfinite(forecast.mean).all()


def test_the_random_walk_expects_nothing_and_the_drift_the_training_mean(prepared, forecasts) -> None:
    assert not forecasts["random walk"].mean.any()
    drift = prepared.returns[prepared.split.training].mean(axis=0)
    np.testing.assert_array_equal(forecasts["drift"].mean[-1], drift)


def test_momentum_lets_the_last_twenty_days_go_on(prepared, forecasts) -> None:
    day = prepared.origins[prepared.split.test[5]]
    prices = prepared.series.prices
    expected = np.log(prices[day] / prices[day - 20]) / 20 * np.array([1, 5, 10, 30])
    np.testing.assert_allclose(forecasts["momentum"].mean[5], expected)


def test_ridge_takes_for_each_horizon_the_penalty_that_validation_prefers(prepared, forecasts) -> None:
    rows, split = prepared.features[prepared.origins].astype(float), prepared.split
    for horizon in range(4):
        returns = prepared.returns[:, horizon]
        fits = [Ridge(alpha=penalty).fit(rows[split.training], returns[split.training]) for penalty in RIDGE_PENALTIES]
        losses = [((fit.predict(rows[split.validation]) - returns[split.validation]) ** 2).mean() for fit in fits]
        expected = fits[int(np.argmin(losses))].predict(rows[split.test])
        np.testing.assert_allclose(forecasts["ridge"].mean[:, horizon], expected, rtol=1e-6, atol=1e-9)


def test_constant_intervals_would_hold_80_percent_of_normal_returns_like_those_of_training(prepared, forecasts) -> None:
    deviation = prepared.returns[prepared.split.training].std(axis=0)
    for name in ("random walk", "drift"):
        forecast = forecasts[name]
        np.testing.assert_allclose(
            forecast.upper - forecast.mean, np.tile(1.2815515655 * deviation, (len(forecast.mean), 1))
        )
        np.testing.assert_allclose(forecast.mean - forecast.lower, forecast.upper - forecast.mean)
    assert forecasts["momentum"].lower is None
    assert forecasts["ridge"].upper is None


def test_no_baseline_learns_from_the_test_part(prepared, small_config, forecasts) -> None:
    origin = prepared.origins[prepared.split.test[0]]
    future = prepared.series.prices.copy()
    future[origin + 1 :] *= np.exp(np.linspace(0, 2, len(future) - origin - 1))
    changed = baseline_forecasts(
        prepare_series(replace(prepared.series, prices=future), small_config), prepared.split.test[:1]
    )
    for name in BASELINES:
        np.testing.assert_allclose(changed[name].mean[0], forecasts[name].mean[0], rtol=1e-9)


def test_ewma_is_the_network_before_its_training_where_volatility_just_goes_on(prepared, forecasts) -> None:
    prepared = replace(prepared, terms=np.zeros_like(prepared.terms))
    untrained = forecast_samples(untrained_model(prepared, seed=0), prepared.part(prepared.split.test))
    lower, upper = (untrained.quantiles[..., QUANTILES.index(level)] for level in (0.1, 0.9))
    np.testing.assert_allclose(forecasts["ewma"].mean, untrained.mean, rtol=1e-5)
    np.testing.assert_allclose(forecasts["ewma"].lower, lower, rtol=1e-4)
    np.testing.assert_allclose(forecasts["ewma"].upper, upper, rtol=1e-4)
