"""The tests of significance against scipy, statsmodels and the formulas of their papers."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mambakit.forecast.significance import holm, overlapping_mean_test


def overlapping(samples: int, horizon: int, seed: int) -> np.ndarray:
    """Sums over `horizon` days of independent noise, every day: what errors of overlapping forecasts look like."""
    noise = np.random.default_rng(seed).normal(size=samples + horizon - 1)
    return np.convolve(noise, np.ones(horizon), "valid")


def test_without_overlap_it_is_the_t_test() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1.0, 80)
    ours = overlapping_mean_test(differences, horizon=1)
    expected = stats.ttest_1samp(differences, 0.0, alternative="greater")
    assert ours.mean == pytest.approx(differences.mean())
    assert ours.p_value == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize("horizon", [2, 5, 30])
def test_the_error_sums_the_autocovariances_of_the_overlap(horizon: int) -> None:
    differences = overlapping(600, horizon, seed=1)
    centred = differences - differences.mean()
    variance = centred @ centred + 2 * sum(centred[lag:] @ centred[:-lag] for lag in range(1, horizon))
    assert overlapping_mean_test(differences, horizon).error == pytest.approx(np.sqrt(variance) / 600, rel=1e-9)


def test_the_p_value_is_that_of_diebold_and_mariano_with_harveys_correction() -> None:
    count, horizon = 200, 5
    test = overlapping_mean_test(overlapping(count, horizon, seed=2), horizon)
    correction = np.sqrt((count + 1 - 2 * horizon + horizon * (horizon - 1) / count) / count)
    assert test.p_value == pytest.approx(stats.t.sf(correction * test.mean / test.error, count - 1))


def test_where_the_sum_is_not_positive_newey_and_wests_takes_its_place() -> None:
    differences = np.tile([1.0, -1.0], 20) + 0.1  # g_0 + 2 g_1 < 0
    centred = differences - differences.mean()
    variance = centred @ centred + centred[1:] @ centred[:-1]  # lag 1 has weight 1/2
    assert variance > 0
    assert overlapping_mean_test(differences, 2).error == pytest.approx(np.sqrt(variance) / 40)


def test_differences_all_alike_prove_nothing() -> None:
    for value in (0.0, 0.3):
        test = overlapping_mean_test(np.full(50, value), horizon=5)
        assert (test.mean, test.error, test.p_value) == (pytest.approx(value), 0.0, 1.0)


def test_pure_chance_is_called_significant_about_as_often_as_it_says() -> None:
    p_values = [overlapping_mean_test(overlapping(400, 10, seed), horizon=10).p_value for seed in range(400)]
    share = np.mean(np.array(p_values) < 0.05)
    assert 0.02 < share < 0.08  # Newey and West's weights on these lags give 0.10, ignoring the overlap 0.30


def test_a_large_sure_gain_is_significant() -> None:
    assert overlapping_mean_test(overlapping(400, 10, seed=3) + 5.0, horizon=10).p_value < 0.001


def test_a_horizon_longer_than_the_sample_is_survived() -> None:
    assert 0.0 <= overlapping_mean_test(np.array([1.0, 2.0, 4.0]), horizon=30).p_value <= 1.0


def test_holm_is_that_of_statsmodels() -> None:
    p_values = [0.04, 0.001, 0.03, 0.5, 0.03, 1.0]
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1])
