"""A model that keeps its promises is left alone, and one that does not is named, whatever it is that went."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from mambakit.forecast.monitor import MonitorReport, Thresholds, _inflation, independent_count, monitor
from mambakit.forecast.prediction_log import LoggedForecasts
from mambakit.forecast.reference import Promise, Reference

LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
NORMAL = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
HORIZONS = (1, 5)
COLUMNS = ("mean", "drift", "quantiles", "outcome", "volatility", "features")
NAMES = ("a", "b", "c")
FEATURES = np.random.default_rng(1).normal(size=(2000, 3))
# The CRPS of a standard normal forecast of standard normal outcomes is 1 / sqrt pi; of so few quantiles, a bit less.
LOSS = 0.47


def life(days: int = 300, seed: int = 0, deviation: float = 1.0, shift: float = 0.0) -> LoggedForecasts:
    """Forecasts of independent daily returns that were right when `deviation` was 1."""
    generator = np.random.default_rng(seed)
    total = np.cumsum(np.concatenate([[0.0], generator.normal(scale=0.01 * deviation, size=days + max(HORIZONS))]))
    outcome = np.stack([(total[horizon:] - total[:-horizon])[:days] for horizon in HORIZONS], axis=1)
    scale = 0.01 * np.sqrt(HORIZONS)
    return LoggedForecasts(
        as_of=np.arange(days).astype("datetime64[D]"),
        horizons=HORIZONS,
        levels=LEVELS,
        mean=np.zeros((days, len(HORIZONS))),
        drift=np.zeros((days, len(HORIZONS))),
        quantiles=np.broadcast_to(scale[:, None] * NORMAL, (days, len(HORIZONS), len(LEVELS))),
        outcome=outcome,
        volatility=np.full(days, 0.01),
        features=generator.normal(size=(days, 3)) + shift,
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    edges = tuple(np.quantile(column, np.arange(1, 10) / 10) for column in FEATURES.T)
    counts = tuple(np.full(10, len(FEATURES) // 10) for _ in NAMES)
    usual = {60: np.full(3, 0.4), 250: np.full(3, 0.1)}
    promises = {horizon: Promise(600, LOSS, 0.02, {"0.8": 0.8}) for horizon in HORIZONS}
    return Reference(NAMES, edges, counts, usual, promises)


def judge(forecasts: LoggedForecasts, reference: Reference | None, **limits: float) -> MonitorReport:
    return monitor("AAPL", "v1", forecasts, reference, Thresholds(**limits))


def test_a_model_that_keeps_its_promises_is_left_alone(reference: Reference) -> None:
    report = judge(life(), reference)
    assert not report.decayed
    assert report.sentence == "AAPL v1: no sign of decay (250 forecasts, 1970-02-20 to 1970-10-27)"
    for row in report.horizons:
        assert row.judged
        assert row.loss == pytest.approx(LOSS, abs=0.06)


def test_false_alarms_are_as_rare_as_they_are_promised_to_be(reference: Reference) -> None:
    alarms = sum(judge(life(seed=seed), reference).decayed for seed in range(100))
    # At a significance of 1%, 5 or more of 100 come by chance once in 290 times.
    assert alarms <= 4


def test_outcomes_wilder_than_the_intervals_are_found(reference: Reference) -> None:
    report = judge(life(deviation=1.6), reference)
    assert report.decayed
    assert "its 80% interval at 1d held " in report.sentence
    assert "would be chance" in report.sentence
    assert "mambakit forecast train --symbols AAPL" in report.sentence


def test_intervals_that_have_become_too_wide_are_found(reference: Reference) -> None:
    assert "its 50% interval at 1d held" in judge(life(deviation=0.4), reference).sentence


def test_a_loss_above_the_promise_is_found_where_the_coverage_still_holds(reference: Reference) -> None:
    promises = {horizon: Promise(600, LOSS / 2, 0.01, {}) for horizon in HORIZONS}
    report = judge(life(), replace(reference, promises=promises))
    assert report.decayed
    assert "its loss at 1d is" in report.sentence
    assert "interval" not in report.sentence


def test_shifted_inputs_are_found_when_they_are_most_of_them(reference: Reference) -> None:
    report = judge(life(shift=1.5), reference)
    assert report.decayed
    assert "3 of 3 inputs have shifted" in report.sentence
    one = life()
    one.features[:, 0] += 3.0
    assert not judge(one, reference).decayed
    assert [drift.name for drift in judge(one, reference).inputs if drift.shifted] == ["a"]
    assert judge(one, reference, shifted_share=0.3).decayed


def test_what_is_usual_for_an_input_is_no_shift(reference: Reference) -> None:
    tolerant = replace(reference, usual={60: np.full(3, 50.0)})
    assert not judge(life(shift=1.5), tolerant).decayed


def test_only_the_latest_forecasts_count(reference: Reference) -> None:
    wild, calm = life(200, deviation=2.0), life(260, seed=1)
    both = LoggedForecasts(
        np.arange(460).astype("datetime64[D]"),
        HORIZONS,
        LEVELS,
        *(np.concatenate([getattr(wild, name), getattr(calm, name)]) for name in COLUMNS),
    )
    assert not judge(both, reference).decayed
    assert judge(both, reference, window=460).decayed


def test_a_horizon_is_judged_once_enough_outcomes_are_known(reference: Reference) -> None:
    few = life(39)
    report = judge(few, reference)
    assert [row.judged for row in report.horizons] == [True, False]
    assert report.unknown == ("5d has 39 of 40 outcomes", "inputs need 60 days")
    assert judge(life(20), reference).sentence.startswith("AAPL v1: too early to tell (20 forecasts")


def test_outcomes_that_are_not_known_yet_do_not_count(reference: Reference) -> None:
    forecasts = life(100)
    forecasts.outcome[-10:] = np.nan
    assert [row.outcomes for row in judge(forecasts, reference).horizons] == [90, 90]


def test_without_any_forecast_there_is_nothing_to_say(reference: Reference) -> None:
    nothing = replace(life(1), **{name: getattr(life(1), name)[:0] for name in ("as_of", *COLUMNS)})
    report = judge(nothing, reference)
    assert not report.decayed
    assert report.sentence == "AAPL v1: no predictions yet"


def test_without_a_reference_calibration_is_still_judged() -> None:
    report = judge(life(deviation=1.6), None)
    assert report.decayed
    assert report.horizons[0].promised_loss is None
    assert "stored without reference.json" in report.unknown[-1]


def test_overlapping_hits_count_as_fewer() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    assert independent_count((np.abs(values) < 1.28).astype(float), 1, 0.8) == pytest.approx(2000, rel=1e-6)
    total = np.cumsum(values)
    hits = (np.abs(total[10:] - total[:-10]) < 1.28 * np.sqrt(10)).astype(float)
    assert 150 < independent_count(hits, 10, 0.8) < 500
    assert independent_count(np.ones(100), 10, 0.8) == 10


@pytest.mark.parametrize("horizon", [2, 10])
def test_the_least_inflation_is_that_of_simulated_normal_returns(horizon: int) -> None:
    generator = np.random.default_rng(0)
    total = np.cumsum(generator.normal(size=(400, 500 + horizon)), axis=1)
    hits = np.abs(total[:, horizon:] - total[:, :-horizon]) < 1.2816 * np.sqrt(horizon)
    simulated = hits.mean(axis=1).var() * hits.shape[1] / (0.8 * 0.2)
    assert _inflation(horizon, 0.8) == pytest.approx(simulated, rel=0.2)
