"""The baselines: each against its definition, and none of them aware of the test part."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge

from mambakit.errors import DataError
from mambakit.forecast.baselines import ALL_BASELINES, BASELINES, baseline_forecasts
from mambakit.forecast.baselines import garch as garch_module
from mambakit.forecast.baselines.garch import fit_garch, next_day_variance, summed_variance
from mambakit.forecast.baselines.recurrent import gru_of_size
from mambakit.forecast.baselines.regressions import RIDGE_PENALTIES
from mambakit.forecast.config import QUANTILES, SEQUENCE_TRAINING
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.train import forecast_samples, untrained_model

QUICK = SEQUENCE_TRAINING.model_copy(update={"epochs": 3, "learning_rate": 1e-2})
HORIZONS = np.array([1, 5, 10, 30])


@pytest.fixture(scope="module")
def forecasts(prepared):
    made = baseline_forecasts(prepared, prepared.split.test, ALL_BASELINES, training=QUICK)
    assert made.left_out == ()
    return made.predictions


def test_every_baseline_forecasts_every_sample_horizon_and_level(prepared, forecasts) -> None:
    assert tuple(forecasts) == ALL_BASELINES
    for forecast in forecasts.values():
        assert forecast.mean.shape == (len(prepared.split.test), 4)
        assert np.isfinite(forecast.mean).all()
        assert np.isfinite(forecast.quantiles).all()
        assert (np.diff(forecast.quantiles, axis=-1) > 0).all()


def test_the_random_walk_expects_nothing_and_the_drift_the_training_mean(prepared, forecasts) -> None:
    drift = prepared.returns[prepared.split.training].mean(axis=0)
    np.testing.assert_array_equal(forecasts["drift"].mean[-1], drift)
    for name in ("random walk", "ewma walk", "garch walk"):
        assert not forecasts[name].mean.any()


def test_momentum_lets_the_last_twenty_days_go_on(prepared, forecasts) -> None:
    day = prepared.origins[prepared.split.test[5]]
    prices = prepared.series.prices
    expected = np.log(prices[day] / prices[day - 20]) / 20 * HORIZONS
    np.testing.assert_allclose(forecasts["momentum"].mean[5], expected)


def test_ridge_takes_for_each_horizon_the_penalty_that_validation_prefers(prepared, forecasts) -> None:
    rows, split = prepared.features[prepared.origins].astype(float), prepared.split
    for horizon in range(4):
        returns = prepared.returns[:, horizon]
        fits = [Ridge(alpha=penalty).fit(rows[split.training], returns[split.training]) for penalty in RIDGE_PENALTIES]
        losses = [((fit.predict(rows[split.validation]) - returns[split.validation]) ** 2).mean() for fit in fits]
        best = fits[int(np.argmin(losses))]
        mean = best.predict(rows[split.test])
        np.testing.assert_allclose(forecasts["ridge"].mean[:, horizon], mean, rtol=1e-6, atol=1e-9)
        residuals = np.quantile(returns[split.training] - best.predict(rows[split.training]), QUANTILES)
        np.testing.assert_allclose(
            forecasts["ridge"].quantiles[:, horizon] - mean[:, None],
            np.tile(residuals, (len(mean), 1)),
            rtol=1e-5,
            atol=1e-8,
        )


def test_constant_volatility_is_that_of_the_training_part_and_normal(prepared, forecasts) -> None:
    known = prepared.returns[prepared.split.training]
    deviations = {"random walk": np.sqrt((known**2).mean(axis=0)), "drift": known.std(axis=0)}
    for name, deviation in deviations.items():
        forecast = forecasts[name]
        expected = np.outer(deviation, stats.norm.ppf(QUANTILES))
        np.testing.assert_allclose((forecast.quantiles - forecast.mean[..., None])[7], expected, atol=1e-12)


def test_the_ewma_walk_is_normal_with_todays_volatility_and_the_square_root_of_time(prepared, forecasts) -> None:
    origin = prepared.origins[prepared.split.test[3]]
    expected = prepared.volatility[origin] * np.sqrt(HORIZONS)
    np.testing.assert_allclose(forecasts["ewma walk"].interval(0.95)[1][3], 1.959964 * expected, rtol=1e-6)


def test_ewma_is_the_network_before_its_training_where_volatility_just_goes_on(prepared, forecasts) -> None:
    prepared = replace(prepared, terms=np.zeros_like(prepared.terms))
    untrained = forecast_samples(untrained_model(prepared, seed=0), prepared.part(prepared.split.test))
    np.testing.assert_allclose(forecasts["ewma"].mean, untrained.mean, rtol=1e-5)
    np.testing.assert_allclose(forecasts["ewma"].quantiles, untrained.quantiles, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL_BASELINES if name != "gru"])
def test_no_baseline_learns_from_the_test_part(prepared, small_config, forecasts, name: str) -> None:
    origin = prepared.origins[prepared.split.test[0]]
    future = prepared.series.prices.copy()
    future[origin + 1 :] *= np.exp(np.linspace(0, 2, len(future) - origin - 1))
    other = prepare_series(replace(prepared.series, prices=future), small_config)
    changed = baseline_forecasts(other, prepared.split.test[:1], [name]).predictions[name]
    np.testing.assert_allclose(changed.quantiles[0], forecasts[name].quantiles[0], rtol=1e-6)


def simulated_garch(days: int, seed: int) -> np.ndarray:
    """Returns in per cent with omega 0.05, alpha 0.08, beta 0.9 and eight degrees of freedom."""
    innovations = np.random.default_rng(seed).standard_t(8, days) * np.sqrt(6 / 8)
    returns, variance = np.empty(days), 2.5
    for day in range(days):
        returns[day] = np.sqrt(variance) * innovations[day]
        variance = 0.05 + 0.08 * returns[day] ** 2 + 0.9 * variance
    return returns


def test_the_garch_fit_finds_the_parameters_of_a_simulation() -> None:
    _, alpha, beta, freedoms = fit_garch(simulated_garch(8000, seed=0))
    assert alpha == pytest.approx(0.08, abs=0.02)
    assert beta == pytest.approx(0.9, abs=0.025)
    assert freedoms == pytest.approx(8, abs=2.5)


def test_a_garch_fit_that_student_t_defeats_goes_on_with_normal_innovations() -> None:
    returns = np.round(simulated_garch(1200, seed=2) / 4) * 4  # coarse ticks: most days do not move at all
    _, alpha, beta, freedoms = fit_garch(returns)
    assert freedoms > 1e5
    assert 0 <= alpha + beta < 1


def test_the_garch_filter_is_the_recursion_day_by_day() -> None:
    returns, (omega, alpha, beta) = simulated_garch(50, seed=1), (0.05, 0.1, 0.85)
    variance = omega / (1 - alpha - beta)
    for day, filtered in enumerate(next_day_variance(returns, omega, alpha, beta)):
        variance = omega + alpha * returns[day] ** 2 + beta * variance
        assert filtered == pytest.approx(variance)


def test_the_variance_of_a_sum_adds_the_recursions_forecasts() -> None:
    omega, alpha, beta = 0.05, 0.1, 0.85
    ahead, total = 4.0, 0.0
    for _ in range(30):
        total, ahead = total + ahead, omega + (alpha + beta) * ahead
    ours = summed_variance(np.array([4.0]), np.array([1, 30]), omega, alpha, beta)
    np.testing.assert_allclose(ours, [[4.0, total]])


def test_garch_quantiles_have_the_variance_they_claim(prepared, forecasts) -> None:
    deviation = forecasts["garch walk"].interval(0.5)[1] / forecasts["ewma walk"].interval(0.5)[1]
    assert ((deviation > 0.3) & (deviation < 3.0)).all()  # same units, same horizons


def test_ets_of_a_random_walk_forecasts_hardly_any_change(forecasts) -> None:
    assert np.abs(forecasts["ets"].mean).mean() < 0.5 * np.abs(forecasts["momentum"].mean).mean()


def test_arima_finds_the_memory_of_the_series(prepared, forecasts) -> None:
    # 70% of each day's return comes again in this series.
    tomorrow = prepared.returns[prepared.split.test, 0]
    assert np.corrcoef(forecasts["arima"].mean[:, 0], tomorrow)[0, 1] > 0.5


def test_the_gru_has_as_many_parameters_as_the_blocks_it_replaces() -> None:
    for parameters in (20_000, 130_000):
        size = sum(parameter.numel() for parameter in gru_of_size(64, 4, parameters).parameters())
        assert size == pytest.approx(parameters, rel=0.02)


def test_the_gru_is_trained_and_another_seed_gives_another(prepared, forecasts) -> None:
    other = QUICK.model_copy(update={"seed": 1})
    again, different = (
        baseline_forecasts(prepared, prepared.split.test, ["gru"], training=training).predictions["gru"].quantiles
        for training in (QUICK, other)
    )
    np.testing.assert_array_equal(again, forecasts["gru"].quantiles)
    assert not np.allclose(again, different, rtol=1e-6)
    assert not np.allclose(different, forecasts["ewma"].quantiles, rtol=1e-3)  # where the training of both began


def test_a_gru_carries_its_state(prepared) -> None:
    backbone = gru_of_size(8, 2, 2000).eval()
    hidden = torch.randn(3, 9, 8)
    whole, _ = backbone(hidden)
    first, state = backbone(hidden[:, :4])
    second, _ = backbone(hidden[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


def test_a_baseline_whose_package_is_missing_is_left_out_with_a_sentence(prepared, monkeypatch) -> None:
    monkeypatch.setattr("mambakit.forecast.baselines.find_spec", lambda package: None)
    made = baseline_forecasts(prepared, prepared.split.test, ("drift", "garch walk"))
    assert list(made.predictions) == ["drift"]
    assert made.left_out == ("garch walk: left out, arch is not installed (pip install 'mambakit[baselines]')",)


def test_a_baseline_whose_fit_fails_is_left_out_with_the_reason(prepared, monkeypatch) -> None:
    def fail(returns: np.ndarray) -> None:
        raise DataError("the GARCH fit did not converge")

    monkeypatch.setattr(garch_module, "fit_garch", fail)
    made = baseline_forecasts(prepared, prepared.split.test, ("garch walk", "drift"))
    assert list(made.predictions) == ["drift"]
    assert "did not converge" in made.left_out[0]


def test_an_unknown_baseline_is_refused_with_those_there_are(prepared) -> None:
    with pytest.raises(DataError, match=r"no baseline is called prophet; there are random walk, .*gru"):
        baseline_forecasts(prepared, prepared.split.test, ["prophet"])


def test_the_default_ones_need_no_extra_package() -> None:
    assert set(BASELINES).isdisjoint({"garch walk", "ets", "arima", "gru"})
