"""Each score against a closed form, a count by hand, or scikit-learn."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import mean_pinball_loss

from mambakit.errors import DataError
from mambakit.forecast import metrics
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.predictions import Predictions, interval_columns, joined, normal_predictions, pit, quantiles_at

ACTUAL = np.random.default_rng(0).normal(0.001, 0.02, 200)
MEAN = 0.3 * ACTUAL + 0.002


def normal_crps(z: np.ndarray) -> np.ndarray:
    """Gneiting and Raftery (2007), equation 21, of the standard normal."""
    return z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)


def test_r2_is_one_minus_the_ratio_of_squared_errors() -> None:
    expected = 1 - ((ACTUAL - MEAN) ** 2).sum() / ((ACTUAL - 0.001) ** 2).sum()
    assert metrics.r2_out_of_sample(ACTUAL, MEAN, np.full(200, 0.001)) == pytest.approx(expected)
    assert metrics.r2_out_of_sample(ACTUAL, np.zeros(200), np.zeros(200)) == 0.0


def test_mase_counts_in_the_usual_change_of_each_fold() -> None:
    usual = np.repeat([0.01, 0.03], 100)
    assert metrics.mase(ACTUAL, MEAN, usual) == pytest.approx(np.abs(ACTUAL - MEAN).mean() / 0.02)


def test_smape_is_the_usual_one_of_prices_whatever_their_level() -> None:
    for price in (1.0, 640.0):
        real, forecast = price * np.exp(ACTUAL), price * np.exp(MEAN)
        expected = (2 * np.abs(real - forecast) / (real + forecast)).mean()
        assert metrics.smape(ACTUAL, MEAN) == pytest.approx(expected)


def test_pinball_is_that_of_scikit_learn() -> None:
    quantiles = np.random.default_rng(1).normal(size=(200, 3)) / 50
    ours = metrics.pinball(quantiles, ACTUAL, (0.1, 0.5, 0.7)).mean(axis=0)
    expected = [mean_pinball_loss(ACTUAL, quantiles[:, i], alpha=p) for i, p in enumerate((0.1, 0.5, 0.7))]
    np.testing.assert_allclose(ours, expected)


def test_the_crps_of_a_normal_is_its_closed_form_within_half_a_per_cent() -> None:
    z = np.random.default_rng(2).normal(size=20_000)
    quantiles = np.tile(norm.ppf(QUANTILES), (len(z), 1))
    assert metrics.crps(quantiles, z, QUANTILES).mean() == pytest.approx(normal_crps(z).mean(), rel=0.005)


def test_the_crps_converges_to_the_closed_form_at_every_value_for_unequal_levels_too() -> None:
    levels = np.sort(np.random.default_rng(3).uniform(size=4000))
    z = np.array([-2.5, -0.3, 0.0, 1.7])
    quantiles = np.tile(norm.ppf(levels), (4, 1))
    np.testing.assert_allclose(metrics.crps(quantiles, z, levels), normal_crps(z), rtol=5e-3)


def test_the_crps_of_a_certain_forecast_is_its_absolute_error() -> None:
    levels = np.linspace(0.001, 0.999, 999)
    assert metrics.crps(np.full((1, 999), 0.5), np.array([2.0]), levels)[0] == pytest.approx(1.5, rel=2e-3)


def test_the_true_distribution_has_the_lowest_crps() -> None:
    z = np.random.default_rng(4).normal(size=5000)
    true, wide, narrow, off = (
        metrics.crps(np.tile(shift + width * norm.ppf(QUANTILES), (5000, 1)), z, QUANTILES).mean()
        for shift, width in ((0, 1), (0, 1.3), (0, 0.7), (0.3, 1))
    )
    assert true < min(wide, narrow, off)


def test_the_interval_score_of_three_values_counted_by_hand() -> None:
    actual, lower, upper = np.array([0.0, 5.0, -2.0]), np.full(3, -1.0), np.full(3, 1.0)
    # Width 2 each; 5 misses by 4 and -2 by 1, each fined tenfold at 80%.
    assert metrics.interval_score(actual, lower, upper, 0.8) == pytest.approx([2, 2 + 40, 2 + 10])


def test_covered_counts_the_ends_in() -> None:
    quantiles = np.tile([-1.0, 0.0, 1.0], (4, 1))
    inside = metrics.covered(quantiles, np.array([-1.0, 1.0, 1.01, -2.0]), (0.1, 0.5, 0.9), 0.8)
    assert inside.tolist() == [True, True, False, False]


def test_an_interval_that_was_not_forecast_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"84% interval needs the quantiles 0\.08 and 0\.92"):
        interval_columns(0.84, QUANTILES)


def test_the_pit_of_a_normal_forecast_is_its_cdf_beyond_the_outer_quantiles_too() -> None:
    values = np.array([-9.0, -3.0, -1.0, 0.1, 2.0, 3.5])
    quantiles = np.tile(1.0 + 2.0 * norm.ppf(QUANTILES), (6, 1))
    np.testing.assert_allclose(pit(quantiles, values), norm.cdf(values, 1.0, 2.0), rtol=1e-9)


def test_the_pit_at_a_quantile_is_its_level_and_reading_back_returns_the_quantile() -> None:
    quantiles = np.sort(np.random.default_rng(5).standard_t(3, size=(7, 4, len(QUANTILES))), axis=-1)
    for column, level in enumerate(QUANTILES):
        np.testing.assert_allclose(pit(quantiles, quantiles[..., column]), level)
    probabilities = np.broadcast_to(np.array([0.001, 0.3, 0.62, 0.999]), (7, 4, 4))
    read = quantiles_at(quantiles, probabilities)
    np.testing.assert_allclose(pit(quantiles[..., None, :], read), probabilities)


def test_equal_quantiles_have_a_pit_all_the_same() -> None:
    values = pit(np.zeros((3, len(QUANTILES))), np.array([-1.0, 0.0, 1.0]))
    assert np.isfinite(values).all()
    assert values[0] == 0.0
    assert values[2] == 1.0


def test_normal_predictions_have_the_normal_interval() -> None:
    predictions = normal_predictions(np.full((2, 1), 0.1), np.full((2, 1), 0.02))
    lower, upper = predictions.interval(0.95)
    np.testing.assert_allclose([lower[0, 0], upper[0, 0]], [0.1 - 0.0391993, 0.1 + 0.0391993], rtol=1e-5)


def test_predictions_join_in_order_and_refuse_other_levels() -> None:
    first, second = (normal_predictions(np.full((2, 1), m), np.ones((2, 1))) for m in (0.0, 5.0))
    assert joined([first, second]).mean[:, 0].tolist() == [0, 0, 5, 5]
    with pytest.raises(DataError, match="21 levels"):
        Predictions(np.zeros((2, 1)), np.zeros((2, 1, 7)))
