"""The tests of significance against scipy, statsmodels and the formulas of their papers."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mambakit.forecast.significance import (
    benjamini_hochberg,
    binomial_test,
    diebold_mariano,
    holm,
    information_coefficient,
    overlapping_mean_test,
    pesaran_timmermann,
    pit_uniformity,
)


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


def test_benjamini_hochberg_is_that_of_statsmodels() -> None:
    p_values = [0.04, 0.001, 0.03, 0.5, 0.03, 1.0]
    np.testing.assert_allclose(benjamini_hochberg(p_values), multipletests(p_values, method="fdr_bh")[1])
    assert benjamini_hochberg([]) == []


def test_diebold_mariano_prefers_the_lower_loss() -> None:
    generator = np.random.default_rng(0)
    good, bad = generator.normal(1.0, 0.1, 200), generator.normal(1.2, 0.1, 200)
    assert diebold_mariano(bad, good, 1).p_value < 1e-9
    assert diebold_mariano(good, bad, 1).p_value > 1 - 1e-9


def signs(hits: int, false_ups: int, misses: int, right_downs: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes and forecasts with these counts: both up, only the forecast up, only the outcome up, both down."""
    actual = np.repeat([1.0, -1.0, 1.0, -1.0], [hits, false_ups, misses, right_downs])
    return actual, np.repeat([1.0, 1.0, -1.0, -1.0], [hits, false_ups, misses, right_downs])


def test_pesaran_timmermann_of_a_table_counted_by_hand() -> None:
    # 100 days: rose on 60, "up" on 55; hits 65. P* = .6 * .55 + .4 * .45 = .51.
    test = pesaran_timmermann(*signs(40, 15, 20, 25), horizon=1)
    of_hits = 0.51 * 0.49 / 100
    of_expected = (0.2**2 * 0.55 * 0.45 + 0.1**2 * 0.6 * 0.4) / 100 + 4 * 0.6 * 0.55 * 0.4 * 0.45 / 100**2
    statistic = (0.65 - 0.51) / np.sqrt(of_hits - of_expected)
    assert test.mean == pytest.approx(0.14)
    assert test.p_value == pytest.approx(stats.norm.sf(statistic))


def test_pesaran_timmermann_squared_is_nearly_the_chi_squared_of_independence() -> None:
    actual, mean = signs(4000, 1500, 2000, 2500)
    test = pesaran_timmermann(actual, mean, horizon=1)
    chi_squared = stats.chi2_contingency([[4000, 1500], [2000, 2500]], correction=False).statistic
    assert (test.mean / test.error) ** 2 == pytest.approx(chi_squared, rel=0.001)


def test_always_up_is_nothing_to_test() -> None:
    actual = np.random.default_rng(0).normal(size=50)
    assert pesaran_timmermann(actual, np.ones(50), horizon=1) is None
    assert pesaran_timmermann(np.ones(50), actual, horizon=5) is None


@pytest.mark.parametrize("horizon", [1, 10])
def test_signs_that_know_nothing_are_called_significant_about_as_often_as_it_says(horizon: int) -> None:
    tests = [
        pesaran_timmermann(overlapping(400, horizon, seed) + 0.3, overlapping(400, horizon, 1000 + seed) + 0.3, horizon)
        for seed in range(300)
    ]
    share = np.mean([test.p_value < 0.05 for test in tests if test is not None])
    assert 0.02 < share < 0.10  # ignoring the overlap at ten days it would be above 0.2


def test_the_binomial_test_counts_every_hth_sample() -> None:
    hits = np.tile([True, False, False, False, False], 12)  # right on every fifth day
    assert binomial_test(hits, 0.5, horizon=5) == pytest.approx(0.5**12)
    assert binomial_test(hits, 0.5, horizon=1) > 0.99


@pytest.mark.parametrize("ranks", [False, True])
def test_the_information_coefficient_is_the_correlation_of_scipy(ranks: bool) -> None:
    generator = np.random.default_rng(0)
    forecast = generator.normal(size=300)
    actual = 0.1 * forecast + generator.standard_t(3, size=300)
    test = information_coefficient(actual, forecast, 1, ranks=ranks)
    expected = (stats.spearmanr if ranks else stats.pearsonr)(actual, forecast)
    assert test.mean == pytest.approx(expected.statistic)
    assert test.p_value == pytest.approx(expected.pvalue / 2, abs=0.05)


def test_a_constant_forecast_has_no_information_coefficient() -> None:
    actual = np.random.default_rng(0).normal(size=50)
    assert information_coefficient(actual, np.full(50, 0.02), 5) is None


def test_overlapping_forecasts_without_information_seem_to_have_some_as_often_as_it_says() -> None:
    tests = [
        information_coefficient(overlapping(400, 10, seed), overlapping(400, 10, 5000 + seed), 10)
        for seed in range(300)
    ]
    assert 0.02 < np.mean([test.p_value < 0.05 for test in tests]) < 0.11


def test_right_transforms_pass_and_wrong_ones_fail() -> None:
    generator = np.random.default_rng(1)
    right = (generator.permutation(500) + 0.5) / 500  # evenly spread, without memory
    too_narrow = stats.norm.cdf(1.5 * generator.normal(size=500))
    assert pit_uniformity(right, 1).kolmogorov > 0.99
    assert pit_uniformity(right, 1).berkowitz > 0.05
    assert pit_uniformity(too_narrow, 1).berkowitz < 1e-6
    assert pit_uniformity(too_narrow, 1).kolmogorov < 0.01
    assert pit_uniformity(right, 30) is None  # 17 independent ones


def test_memory_in_the_transforms_is_found_by_berkowitz_and_ljung_box_alone() -> None:
    noise = np.random.default_rng(2).normal(size=501)
    remembering = stats.norm.cdf((noise[1:] + 0.6 * noise[:-1]) / np.sqrt(1.36))
    test = pit_uniformity(remembering, 1)
    assert test.kolmogorov > 0.05
    assert test.berkowitz < 1e-6
    assert test.ljung_box < 1e-6


def test_berkowitz_rejects_right_transforms_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    p_values = [pit_uniformity(generator.uniform(size=120), 1).berkowitz for _ in range(400)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09
