"""A key's arm never changes, the shares are what was asked for, and looking every day costs no honesty."""

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast.ab import assign, compare_arms, confidence_sequence, first_look, scaled_losses
from mambakit.forecast.prediction_log import LoggedForecasts
from mambakit.forecast.significance import overlapping_error

LEVELS = (0.1, 0.5, 0.9)


def overlapping(days: int, horizon: int, generator: np.random.Generator) -> np.ndarray:
    """Sums of `horizon` fat-tailed values each, of which neighbours share all but one; mean 0."""
    total = np.cumsum(np.concatenate([[0.0], generator.standard_t(5, days + horizon - 1)]))
    return total[horizon:] - total[:-horizon]


def logged(center: np.ndarray, outcome: np.ndarray, start: int = 0) -> LoggedForecasts:
    """Forecasts of one horizon of a day, quantiles one apart around their centres, at a volatility of 1."""
    count = len(center)
    return LoggedForecasts(
        as_of=np.arange(start, start + count).astype("datetime64[D]"),
        horizons=(1,),
        levels=LEVELS,
        mean=center[:, None],
        drift=np.zeros((count, 1)),
        quantiles=center[:, None, None] + np.array([-1.0, 0.0, 1.0]),
        outcome=outcome[:, None],
        volatility=np.ones(count),
        features=np.empty((count, 0)),
    )


def test_a_key_gets_the_arm_it_has_always_had() -> None:
    # Fixed for ever: a customer must not change sides with a new version of this library.
    arms = [assign(f"customer-{number}", 0.5) for number in range(6)]
    assert "".join(arm[0] for arm in arms) == "cppppc"


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_challenger_gets_the_share_that_was_asked_for(share: float) -> None:
    count = 20_000
    got = sum(assign(f"AAPL:{number}", share) == "challenger" for number in range(count))
    assert abs(got - share * count) < 4 * np.sqrt(count * share * (1 - share))


def test_all_or_nobody_can_get_the_challenger() -> None:
    assert {assign(str(number), 0.0) for number in range(500)} == {"production"}
    assert {assign(str(number), 1.0) for number in range(500)} == {"challenger"}


def test_a_larger_share_keeps_whoever_had_the_challenger_and_another_salt_splits_anew() -> None:
    small, large, other = (
        {number for number in range(2000) if assign(str(number), share, salt) == "challenger"}
        for share, salt in ((0.2, "a"), (0.4, "a"), (0.2, "b"))
    )
    assert small < large
    assert len(small & other) < 0.5 * len(small)


def test_a_share_beyond_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"share must be within 0 and 1, got 1\.5"):
        assign("a", 1.5)


@pytest.mark.parametrize("horizon", [1, 5, 30])
def test_looking_every_day_at_equal_arms_finds_a_winner_in_few_of_100_trials(horizon: int) -> None:
    generator = np.random.default_rng(horizon)
    trials, wrong = 100, 0
    for _ in range(trials):
        bounds = confidence_sequence(overlapping(2000, horizon, generator), horizon)
        wrong += bool(((bounds.lower > 0) | (bounds.upper < 0)).any())
    # 5% are allowed; 11 or more of 100 would come by chance from a 5% test once in 87 times.
    assert wrong <= 10
    # The same trials read by a fixed-time interval every day would be wrong far more often.
    naive = 0
    for _ in range(60):
        values = overlapping(2000, 1, generator)
        days = np.arange(1, 2001)
        naive += bool((np.abs(values.cumsum() / days) > 1.96 * values.std() / np.sqrt(days))[50:].any())
    assert naive >= 12


@pytest.mark.parametrize("horizon", [1, 5])
def test_a_better_arm_is_found_and_the_sooner_the_better_it_is(horizon: int) -> None:
    generator = np.random.default_rng(3)
    days = []
    for lead in (0.3, 1.0):
        values = overlapping(2000, horizon, generator)
        values += lead * values.std()
        bounds = confidence_sequence(values, horizon)
        assert (bounds.lower > 0).any()
        days.append(int((bounds.lower > 0).argmax()))
    assert days[1] < days[0]


def test_the_spread_of_the_bounds_is_the_overlapping_error() -> None:
    values = overlapping(700, 10, np.random.default_rng(0))
    bounds = confidence_sequence(values, 10)
    wider = (bounds.upper[-1] - bounds.mean[-1]) / overlapping_error(values, 10)
    assert 2.5 < wider < 4.0  # for looking every day, instead of 1.96 for looking once
    assert np.isnan(bounds.lower[: first_look(10) - 1]).all()
    assert np.isfinite(bounds.lower[first_look(10) - 1 :]).all()


def test_the_scaled_loss_is_twice_the_mean_pinball_loss_over_the_volatility() -> None:
    loss = scaled_losses(logged(np.array([0.0]), np.array([2.0])))
    assert loss[0, 0] == pytest.approx(2 * (0.1 * 3 + 0.5 * 2 + 0.9 * 1) / 3)


def test_the_arm_with_the_better_centres_wins() -> None:
    generator = np.random.default_rng(0)
    outcome = generator.normal(size=400)
    good, bad = logged(0.5 * outcome, outcome), logged(np.zeros(400), outcome)
    (result,) = compare_arms(bad, good)
    assert result.winner == "challenger"
    assert result.mean > 0
    (result,) = compare_arms(good, bad)
    assert result.winner == "production"
    assert result.decided_on is not None
    assert result.decided_on < np.datetime64("1971-01-01")


def test_arms_that_are_alike_but_for_rounding_have_no_winner() -> None:
    outcome = np.random.default_rng(0).normal(size=400)
    (result,) = compare_arms(logged(np.zeros(400), outcome), logged(np.full(400, 1e-8), outcome))
    assert result.winner is None
    assert result.mean == 0.0


def test_only_days_on_which_both_arms_have_an_outcome_count() -> None:
    outcome = np.random.default_rng(0).normal(size=100)
    unknown = np.where(np.arange(100) < 90, outcome, np.nan)
    (result,) = compare_arms(logged(outcome, unknown), logged(outcome, outcome, start=20))
    assert (result.days, result.winner) == (70, None)
    (result,) = compare_arms(logged(outcome, unknown), logged(outcome, outcome, start=60))
    assert (result.days, result.needed) == (30, 50)
    assert np.isnan(result.lower)
