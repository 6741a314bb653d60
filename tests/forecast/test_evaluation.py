"""Scores against closed forms, on forecasts whose worth is known."""

import json
from statistics import NormalDist

import numpy as np
import pytest

from mambakit.forecast.config import QUANTILES
from mambakit.forecast.evaluation import Evaluation, Score, evaluate
from mambakit.forecast.metrics import crps, interval_score
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import Predictions

SAMPLES = 300
NOISE = 0.01 * np.random.default_rng(0).normal(size=(SAMPLES, 1))
RETURNS = 0.0015 + NOISE - NOISE.mean()
USUAL_CHANGE = 0.008
DRIFT = 0.002
Z = np.array([NormalDist().inv_cdf(level) for level in QUANTILES])


def between(mean: np.ndarray, lower: float | np.ndarray, upper: float | np.ndarray) -> Predictions:
    """Normal quantiles whose 80% interval has these bounds."""
    centre, deviation = (np.asarray((upper + sign * lower) / 2) + 0 * RETURNS for sign in (1, -1))
    return Predictions(mean, centre[..., None] + deviation[..., None] * Z / NormalDist().inv_cdf(0.9))


def recorded(model: Predictions) -> OutOfSample:
    """A record at the horizon of one day of a model beside random walk, drift and ewma."""
    drift = np.full_like(RETURNS, DRIFT)
    return OutOfSample(
        "X",
        (1,),
        np.arange(SAMPLES).astype("datetime64[D]"),
        np.zeros(SAMPLES, dtype=int),
        RETURNS,
        np.full(SAMPLES, 0.01),
        np.full_like(RETURNS, USUAL_CHANGE),
        {
            "mamba": model,
            "random walk": between(np.zeros_like(RETURNS), -0.02, 0.02),
            "drift": between(drift, DRIFT - 0.01, DRIFT + 0.01),
            "ewma": between(drift, RETURNS - 0.02, RETURNS + 0.02),
        },
    )


def judged(model: np.ndarray, lower: float | np.ndarray = -0.02, upper: float | np.ndarray = 0.02) -> Evaluation:
    """The evaluation of a model's means (samples, 1) and 80% interval."""
    return evaluate(recorded(between(model, lower, upper)))


def score(evaluation: Evaluation, forecaster: str = "mamba") -> Score:
    return next(each for each in evaluation.scores if each.forecaster == forecaster)


def test_a_perfect_forecast() -> None:
    evaluation = judged(RETURNS.copy())
    perfect = score(evaluation)
    assert (perfect.r2_random_walk, perfect.r2_drift, perfect.mase, perfect.hit_rate) == pytest.approx(
        (1.0, 1.0, 0.0, 1.0)
    )
    assert perfect.hit_p_value < 1e-9
    assert evaluation.comparisons[0].lowest_error
    assert evaluation.comparisons[0].p_value < 1e-9


def test_r2_is_one_minus_the_ratio_of_squared_errors() -> None:
    model = 0.3 * RETURNS + 0.001
    ours = score(judged(model))
    squared = ((RETURNS - model) ** 2).sum()
    assert ours.r2_random_walk == pytest.approx(1 - squared / (RETURNS**2).sum())
    assert ours.r2_drift == pytest.approx(1 - squared / ((RETURNS - DRIFT) ** 2).sum())


def test_each_reference_has_no_skill_against_itself() -> None:
    evaluation = judged(np.zeros_like(RETURNS))
    assert score(evaluation, "random walk").r2_random_walk == 0.0
    assert score(evaluation, "drift").r2_drift == 0.0


def test_the_error_of_r2_is_the_standard_error_of_the_mean_gain() -> None:
    gain = RETURNS**2 - (RETURNS - DRIFT) ** 2
    expected = gain.std() / np.sqrt(SAMPLES) / (RETURNS**2).mean()
    assert score(judged(RETURNS), "drift").r2_random_walk_error == pytest.approx(expected)


def test_mase_counts_in_the_training_parts_usual_change() -> None:
    expected = np.abs(RETURNS).mean() / USUAL_CHANGE
    assert score(judged(RETURNS), "random walk").mase == pytest.approx(expected)


def test_always_saying_up_scores_the_up_rate_and_proves_nothing() -> None:
    drift = score(judged(RETURNS), "drift")
    assert drift.hit_rate == drift.up_rate == (RETURNS > 0).mean()
    assert drift.hit_p_value is None


def test_saying_nothing_has_no_direction() -> None:
    walk = score(judged(RETURNS), "random walk")
    assert (walk.hit_rate, walk.hit_p_value) == (None, None)


def test_always_saying_down_scores_the_rest_and_its_lead_is_tested() -> None:
    down = score(judged(np.full_like(RETURNS, -0.001)))
    assert down.hit_rate == pytest.approx(1 - down.up_rate)
    assert down.hit_p_value > 0.5  # more days rise than fall here


def test_coverage_is_the_share_inside_the_interval() -> None:
    ours = score(judged(RETURNS, -0.005, 0.012))
    assert ours.coverage_80 == np.mean((RETURNS >= -0.005) & (RETURNS <= 0.012))


def test_the_interval_score_and_crps_are_means_over_the_samples() -> None:
    predictions = between(RETURNS, -0.005, 0.012)
    ours = score(evaluate(recorded(predictions)))
    lower, upper = predictions.interval(0.8)
    assert ours.interval_score_80 == pytest.approx(interval_score(RETURNS, lower, upper, 0.8).mean())
    assert ours.crps == pytest.approx(crps(predictions.quantiles, RETURNS, QUANTILES).mean())


def test_intervals_are_compared_with_those_of_ewma_by_their_scores() -> None:
    # EWMA's are 0.04 wide here and hold every return, as all of these do; so the narrower ones are better.
    spare = 0.001 * np.abs(NOISE)
    narrower = judged(RETURNS, RETURNS - 0.01 - spare, RETURNS + 0.01)
    wider = judged(RETURNS, RETURNS - 0.03 - spare, RETURNS + 0.03)
    assert narrower.comparisons[0].interval_p_value < 1e-9
    assert wider.comparisons[0].interval_p_value > 1 - 1e-9


def test_an_interval_that_misses_is_worse_than_a_wide_one() -> None:
    assert judged(RETURNS, -0.001, 0.001).comparisons[0].interval_p_value > 0.999


def test_calibration_of_the_true_quantiles_is_nominal_and_their_pit_is_flat() -> None:
    true = Predictions(RETURNS, np.tile(np.quantile(RETURNS, QUANTILES), (SAMPLES, 1, 1)))
    evaluation = evaluate(recorded(true))
    assert evaluation.calibration["nominal"] == list(QUANTILES)
    np.testing.assert_allclose(evaluation.calibration["1d"], QUANTILES, atol=1 / SAMPLES)
    np.testing.assert_allclose(evaluation.pit["1d"], 0.1, atol=0.011)
    assert score(evaluation).pit_kolmogorov_p_value > 0.5


def test_intervals_too_narrow_fail_the_tests_of_the_pit() -> None:
    narrow = score(judged(np.full_like(RETURNS, 0.0015), 0.0015 - 0.004, 0.0015 + 0.004))
    assert narrow.pit_berkowitz_p_value < 1e-6
    assert narrow.coverage_80 < 0.5


def test_the_model_is_compared_with_every_other_forecaster_by_crps() -> None:
    sharp = judged(RETURNS.copy(), RETURNS - 0.001, RETURNS + 0.001).comparisons[0]
    assert set(sharp.against) == {"random walk", "drift", "ewma"}
    assert sharp.lowest_crps
    for other in sharp.against.values():
        assert other.crps_ratio < 0.3
        assert other.crps_p_value < 1e-9
    vague = judged(RETURNS.copy(), RETURNS - 0.2, RETURNS + 0.2).comparisons[0]
    assert not vague.lowest_crps
    assert vague.against["drift"].crps_p_value > 1 - 1e-9


def test_forecasts_without_information_have_a_coefficient_near_zero_and_perfect_ones_one() -> None:
    assert score(judged(RETURNS.copy())).ic == pytest.approx(1.0)
    noise = 0.01 * np.random.default_rng(9).normal(size=RETURNS.shape)
    assert abs(score(judged(noise)).ic_t) < 2.5
    assert score(judged(np.full_like(RETURNS, 0.001))).rank_ic is None


def test_signs_without_information_have_no_excess_hits() -> None:
    noise = np.random.default_rng(9).normal(size=RETURNS.shape)
    ours = score(judged(noise))
    assert abs(ours.excess_hits) < 0.08
    assert ours.pesaran_timmermann_p_value > 0.01
    assert score(judged(RETURNS.copy())).pesaran_timmermann_p_value < 1e-9


def test_the_reference_of_the_comparison_is_the_better_of_the_two() -> None:
    assert judged(RETURNS).comparisons[0].reference == "drift"  # the returns' mean is nearer to 0.002 than to 0


def test_a_rounding_error_is_no_gain() -> None:
    evaluation = judged(np.full_like(RETURNS, np.float32(DRIFT)))
    assert score(evaluation).r2_drift == 0.0
    assert evaluation.comparisons[0].p_value == 1.0
    assert not evaluation.comparisons[0].lowest_error


def test_an_evaluation_survives_json() -> None:
    evaluation = judged(0.5 * RETURNS)
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
