"""Calibration on data whose truth is known: what the papers promise, and what overlap and regimes do to it."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from mambakit.errors import DataError
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.conformal import (
    AdaptiveLevels,
    adaptive_predictions,
    add_offsets,
    conformal_offsets,
)
from mambakit.forecast.metrics import covered, crps
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import normal_predictions, pit

Z = norm.ppf(QUANTILES)


def claimed(samples: int, horizons: int = 1, width: float = 1.0) -> np.ndarray:
    """Normal quantiles (samples, horizons, levels), `width` times as wide as a standard normal's."""
    return np.tile(width * Z, (samples, horizons, 1))


@pytest.mark.parametrize("width", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_exchangeable_outcomes_are_covered_at_least_as_promised_and_hardly_more(width: float, level: float) -> None:
    generator = np.random.default_rng(0)
    calibration, later, repeats = 60, 200, 150
    shares = []
    for _ in range(repeats):
        known, coming = generator.standard_t(4, (calibration, 1)), generator.standard_t(4, (later, 1))
        offsets = conformal_offsets(claimed(calibration, width=width), known, np.ones_like(known))
        corrected = add_offsets(claimed(later, width=width), np.ones_like(coming), offsets)
        shares.append(covered(corrected, coming, QUANTILES, level).mean())
    error = np.std(shares) / np.sqrt(repeats)
    # 60 samples hold 1 / 61 too much at each end; at 97.5% they hold too few to promise more than 1 - 2 / 61.
    promise = min(level, 1 - 2 / 61)
    assert promise - 3 * error < np.mean(shares) < level + 2 / 61 + 3 * error


def test_calibration_lowers_the_crps_of_intervals_that_are_off() -> None:
    generator = np.random.default_rng(1)
    known, coming = generator.normal(size=(500, 1)), generator.normal(size=(2000, 1))
    for width in (0.6, 1.6):
        offsets = conformal_offsets(claimed(500, width=width), known, np.ones_like(known), horizons=(1,))
        before = crps(claimed(2000, width=width), coming, QUANTILES).mean()
        after = crps(add_offsets(claimed(2000, width=width), np.ones_like(coming), offsets), coming, QUANTILES).mean()
        right = crps(claimed(2000), coming, QUANTILES).mean()
        assert after - right < 0.25 * (before - right)


def test_offsets_count_in_units_of_the_scale() -> None:
    generator = np.random.default_rng(2)
    scale = generator.uniform(0.5, 2.0, (300, 2))
    outcomes = generator.normal(size=(300, 2))
    offsets = conformal_offsets(claimed(300, 2, 0.7), outcomes, np.ones_like(scale))
    scaled = conformal_offsets(claimed(300, 2, 0.7) * scale[..., None], outcomes * scale, scale)
    np.testing.assert_allclose(scaled, offsets, atol=1e-12)


def test_few_independent_samples_move_little() -> None:
    outcomes = np.random.default_rng(3).normal(size=(400, 2))
    offsets = conformal_offsets(claimed(400, 2, 0.5), outcomes, np.ones((400, 2)), horizons=(1, 30))
    assert np.abs(offsets[1]).mean() < 0.5 * np.abs(offsets[0]).mean()
    free = conformal_offsets(claimed(400, 2, 0.5), outcomes, np.ones((400, 2)))
    at_ten_per_cent = QUANTILES.index(0.1)
    shrink = 0.05**2 / (0.05**2 + 0.09 * 30 / 400)
    assert offsets[1, at_ten_per_cent] == pytest.approx(shrink * free[1, at_ten_per_cent])


def test_a_right_forecaster_over_overlapping_horizons_is_hardly_harmed() -> None:
    losses = {"left": [], "shrunk": [], "free": []}
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=1300)
        month = np.convolve(noise, np.ones(30) / np.sqrt(30), "valid")[:, None]
        known, coming = month[:300], month[400:]
        flat = np.ones_like(known)
        free = conformal_offsets(claimed(300), known, flat)
        shrunk = conformal_offsets(claimed(300), known, flat, horizons=(30,))
        for name, offsets in (("left", 0 * free), ("shrunk", shrunk), ("free", free)):
            corrected = add_offsets(claimed(len(coming)), np.ones_like(coming), offsets)
            losses[name].append(crps(corrected, coming, QUANTILES).mean())
    harm = {name: np.mean(values) / np.mean(losses["left"]) - 1 for name, values in losses.items()}
    assert harm["shrunk"] < 0.02
    assert harm["shrunk"] < 0.3 * harm["free"]


@pytest.mark.parametrize("seed", range(5))
def test_corrected_quantiles_never_cross(seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantiles = np.sort(generator.standard_t(2, (80, 3, len(QUANTILES))), axis=-1)
    outcomes, scale = generator.normal(size=(80, 3)), generator.uniform(0.1, 3.0, (80, 3))
    offsets = conformal_offsets(quantiles, outcomes, scale)
    assert (np.diff(quantiles + offsets * scale[..., None], axis=-1) >= -1e-9).all()
    later = np.sort(generator.normal(size=(50, 3, len(QUANTILES))), axis=-1)
    assert (np.diff(add_offsets(later, np.ones((50, 3)), offsets), axis=-1) >= 0).all()


def test_garch_outcomes_are_covered_when_the_scale_follows_their_volatility() -> None:
    returns, deviation = garch(3000, seed=4)
    scale = deviation[:, None]
    quantiles = 0.7 * scale[..., None] * Z  # 70% as wide as it should be
    offsets = conformal_offsets(quantiles[:600], returns[:600, None], scale[:600], horizons=(1,))
    corrected = add_offsets(quantiles[600:], scale[600:], offsets)
    before = covered(quantiles[600:], returns[600:, None], QUANTILES, 0.8).mean()
    after = covered(corrected, returns[600:, None], QUANTILES, 0.8).mean()
    assert before < 0.7
    assert 0.77 < after < 0.83


def garch(days: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal GARCH(1,1) returns (days,) and their true standard deviations (days,)."""
    innovations = np.random.default_rng(seed).normal(size=days)
    returns, deviation, variance = np.empty(days), np.empty(days), 1.0
    for day in range(days):
        deviation[day] = np.sqrt(variance)
        returns[day] = deviation[day] * innovations[day]
        variance = 0.02 + 0.1 * returns[day] ** 2 + 0.88 * variance
    return returns, deviation


def recorded(outcomes: np.ndarray, width: float, horizons: tuple[int, ...] = (1,)) -> OutOfSample:
    """A forecaster that always says a normal of this width."""
    samples = len(outcomes)
    model = normal_predictions(np.zeros_like(outcomes), np.full_like(outcomes, width))
    dates = np.arange(samples).astype("datetime64[D]")
    ones = np.ones(samples)
    return OutOfSample("X", horizons, dates, 0 * ones, outcomes, ones, np.ones_like(outcomes), {"mamba": model})


@pytest.mark.parametrize("width", [0.7, 1.0, 2.0])
def test_adaptive_levels_converge_to_the_promise_for_any_forecaster(width: float) -> None:
    outcomes = np.random.default_rng(5).standard_t(4, (6000, 1))
    adapted = adaptive_predictions(recorded(outcomes, width), "mamba", rate=0.02)
    for level in (0.5, 0.8):
        assert covered(adapted.quantiles, outcomes, QUANTILES, level)[1000:].mean() == pytest.approx(level, abs=0.02)


def test_adaptive_levels_recover_from_a_change_of_regime() -> None:
    noise = np.random.default_rng(6).normal(size=(4000, 1))
    outcomes = np.concatenate([noise[:2000], 2.5 * noise[2000:]])
    record = recorded(outcomes, 1.0)
    fixed = covered(record.predictions["mamba"].quantiles, outcomes, QUANTILES, 0.8)[2500:].mean()
    adapted = covered(adaptive_predictions(record, "mamba", rate=0.02).quantiles, outcomes, QUANTILES, 0.8)[
        2500:
    ].mean()
    assert fixed < 0.45
    assert 0.77 < adapted < 0.83


def test_adaptive_levels_of_a_right_forecaster_stay_where_they_are_over_overlapping_horizons() -> None:
    noise = np.random.default_rng(7).normal(size=3029)
    outcomes = np.convolve(noise, np.ones(30), "valid")[:, None]
    record = recorded(outcomes, np.sqrt(30), (30,))
    raw, adapted = record.predictions["mamba"].quantiles, adaptive_predictions(record, "mamba").quantiles
    assert crps(adapted, outcomes, QUANTILES).mean() < 1.02 * crps(raw, outcomes, QUANTILES).mean()


def test_adapting_reads_no_outcome_before_its_day() -> None:
    generator = np.random.default_rng(8)
    outcomes = generator.normal(size=(120, 2))
    changed = outcomes.copy()
    changed[60:, 0] += 5.0  # known from sample 61 on
    changed[60:, 1] += 5.0  # over ten days: from sample 70 on
    before, after = (adaptive_predictions(recorded(each, 1.0, (1, 10)), "mamba") for each in (outcomes, changed))
    for column, first in ((0, 61), (1, 70)):
        differs = (before.quantiles[:, column] != after.quantiles[:, column]).any(axis=-1)
        assert differs.argmax() == first


def test_the_step_is_that_of_gibbs_and_candes() -> None:
    state = AdaptiveLevels.start((1, 5), levels=(0.1, 0.5, 0.9), rate=0.05)
    state.update(np.array([0.3, np.nan]), state.now)
    np.testing.assert_allclose(state.now[0], [0.1 + 0.05 * 0.1, 0.5 + 0.05 * (0.5 - 1), 0.9 + 0.05 * (0.9 - 1)])
    np.testing.assert_allclose(state.now[1], [0.1, 0.5, 0.9])
    state.update(np.array([np.nan, 0.3]), state.now)
    np.testing.assert_allclose(state.now[1, 0], 0.1 + 0.01 * 0.1)  # a fifth of the rate over five days


def test_serving_gives_what_the_backtest_gives() -> None:
    outcomes = np.random.default_rng(9).standard_t(3, (50, 1))
    record = recorded(outcomes, 0.7)
    raw = record.predictions["mamba"].quantiles
    state, used = AdaptiveLevels.start((1,)), None
    for sample in range(50):
        if used is not None:
            state.update(pit(raw[sample - 1], outcomes[sample - 1]), used)
        state = AdaptiveLevels.from_json(json.loads(json.dumps(state.to_json())))
        used, given = state.now, state.calibrate(raw[sample])
    np.testing.assert_allclose(given, adaptive_predictions(record, "mamba").quantiles[-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actual": np.zeros((5, 2))}, r"got \(5, 1, 21\), \(5, 2\)"),
        ({"scale": np.zeros((5, 1))}, "scale must be positive"),
        ({"levels": QUANTILES[::-1]}, "levels must increase"),
        ({"horizons": (1, 5)}, "horizons must name 1"),
        ({"quantiles": np.zeros((0, 1, 21)), "actual": np.zeros((0, 1)), "scale": np.zeros((0, 1))}, "one sample"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str) -> None:
    right = {"quantiles": claimed(5), "actual": np.zeros((5, 1)), "scale": np.ones((5, 1)), "levels": QUANTILES}
    with pytest.raises(DataError, match=words):
        conformal_offsets(**{**right, **change})


def test_a_rate_beyond_one_is_refused() -> None:
    with pytest.raises(DataError, match=r"rate must be within \[0, 1\]"):
        AdaptiveLevels.start((1,), rate=1.5)
