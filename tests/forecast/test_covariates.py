"""Calendars counted by hand, index returns that never look ahead, and both beside the features."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forecast.walks import random_walk

from mambakit.errors import DataError
from mambakit.forecast import append_covariates, calendar_covariates, index_return_covariates
from mambakit.forecast.features import TimeSeriesFeatureEngineer
from mambakit.forecast.prices import fetch_historical_prices
from mambakit.forecast.windows import SequenceGenerator


def days(first: str, last: str, *closed: str) -> np.ndarray:
    """Weekdays from first to last, without those on which the exchange was closed."""
    every = np.arange(first, np.datetime64(last) + 1, dtype="datetime64[D]")
    return every[np.is_busday(every, holidays=closed)]


def column(covariates, name: str) -> np.ndarray:
    return covariates.values[:, covariates.names.index(name)]


def test_the_week_goes_round_in_seven_days() -> None:
    dates = days("2013-02-25", "2013-03-01")  # Monday to Friday
    calendar = calendar_covariates(dates)
    angle = np.arctan2(column(calendar, "day_of_week_sin"), column(calendar, "day_of_week_cos")) % (2 * np.pi)
    np.testing.assert_allclose(angle / (2 * np.pi) * 7, [0, 1, 2, 3, 4], atol=1e-9)


def test_the_year_goes_round_also_in_leap_years() -> None:
    calendar = calendar_covariates(np.array(["2012-01-01", "2012-07-01", "2013-01-01"], dtype="datetime64[D]"))
    np.testing.assert_allclose(column(calendar, "month_sin")[[0, 2]], 0.0, atol=1e-12)
    np.testing.assert_allclose(column(calendar, "month_cos")[[0, 2]], 1.0)
    assert column(calendar, "month_cos")[1] == pytest.approx(np.cos(2 * np.pi * 182 / 366))


def test_the_turn_of_the_month_is_three_trading_days_on_either_side() -> None:
    dates = days("2013-02-18", "2013-03-12")
    turn = dates[column(calendar_covariates(dates), "turn_of_month") == 1.0]
    expected = ["2013-02-26", "2013-02-27", "2013-02-28", "2013-03-01", "2013-03-04", "2013-03-05"]
    assert turn.astype(str).tolist() == expected


def test_days_since_the_last_one_count_weekends_and_holidays() -> None:
    dates = days("2013-02-14", "2013-02-20", "2013-02-18")  # Presidents' Day
    since = column(calendar_covariates(dates), "days_since_last")
    assert dates.astype(str).tolist() == ["2013-02-14", "2013-02-15", "2013-02-19", "2013-02-20"]
    np.testing.assert_allclose(since, [np.nan, 0.0, np.log(4), 0.0])


@pytest.mark.parametrize("holidays", [(), ("2013-02-18",)])
def test_the_target_day_is_the_weekday_so_many_ahead(holidays: tuple[str, ...]) -> None:
    dates = days("2013-02-14", "2013-02-15")  # Thursday and Friday
    calendar = calendar_covariates(dates, (1, 2), holidays=holidays)
    monday = "2013-02-19" if holidays else "2013-02-18"
    ahead = calendar_covariates(np.array(["2013-02-15", monday], dtype="datetime64[D]"), holidays=holidays)
    for name in ("day_of_week_sin", "day_of_week_cos", "month_sin", "turn_of_month"):
        np.testing.assert_array_equal(column(calendar, f"{name}_ahead_1"), column(ahead, name))
    steps = np.exp(column(calendar, "days_ahead_1")) * 7 / 5
    np.testing.assert_allclose(steps, [1, 4 if holidays else 3])


def test_what_is_traded_every_day_has_no_weekend() -> None:
    dates = np.arange("2013-02-01", "2013-02-20", dtype="datetime64[D]")
    calendar = calendar_covariates(dates, (5,), weekmask="1111111")
    np.testing.assert_allclose(column(calendar, "days_ahead_5"), 0.0, atol=1e-12)


@settings(max_examples=20)
@given(last=st.integers(30, 199), horizon=st.integers(1, 30), lag=st.integers(0, 3), seed=st.integers(0, 1000))
def test_no_row_depends_on_a_later_day(last: int, horizon: int, lag: int, seed: int) -> None:
    series = random_walk(days=200)
    index = random_walk(days=200, seed=seed, symbol="INDEX")
    kept = np.sort(np.random.default_rng(seed).choice(200, 170, replace=False))
    index = index.take(np.union1d(kept, np.arange(0, 200, 4)))
    whole = calendar_covariates(series.dates, (horizon,)), index_return_covariates(series.dates, index, lag=lag)
    known = index.take(index.dates <= series.dates[last - 1])
    until = (
        calendar_covariates(series.dates[:last], (horizon,)),
        index_return_covariates(series.dates[:last], known, lag=lag),
    )
    for all_days, first_days in zip(whole, until, strict=True):
        np.testing.assert_array_equal(first_days.values, all_days.values[:last])


def test_index_returns_are_those_of_the_index() -> None:
    both = fetch_historical_prices(["AAPL", "IBM"])
    covariates = index_return_covariates(both["AAPL"].dates, both["IBM"], windows=(1, 5))
    assert covariates.names == ("ibm_return_1", "ibm_return_5")
    logs = np.log(both["IBM"].prices)
    np.testing.assert_allclose(covariates.values[5:, 1], logs[5:] - logs[:-5])
    assert np.isnan(covariates.values[:5, 1]).all()
    assert covariates.known.argmax() == 5


def test_the_last_known_price_is_carried_forward() -> None:
    series = random_walk(days=40)
    index = random_walk(days=40, seed=1, symbol="^INDEX")
    holed = index.take(np.delete(np.arange(40), [20, 21]))
    returns = index_return_covariates(series.dates, holed, windows=(1,)).values[:, 0]
    logs = np.log(index.prices)
    assert returns[20] == returns[21] == 0.0
    assert returns[22] == pytest.approx(logs[22] - logs[19])
    assert index_return_covariates(series.dates, holed).names[0] == "index_return_1"


def test_an_index_that_comes_late_is_known_late() -> None:
    dates = np.datetime64("2010-01-04") + np.arange(40)  # every day of the week, so that a lag of 1 is a row
    series, index = (replace(random_walk(days=40, seed=seed), dates=dates) for seed in (0, 1))
    prompt, late = (index_return_covariates(series.dates, index, (1,), lag=lag).values for lag in (0, 1))
    np.testing.assert_array_equal(late[2:], prompt[1:-1])


def test_before_the_index_begins_nothing_is_known() -> None:
    series, index = random_walk(days=60), random_walk(days=60, seed=1)
    returns = index_return_covariates(series.dates, index.take(slice(30, None)), windows=(1,)).values
    assert np.isnan(returns[:31]).all()
    assert np.isfinite(returns[31:]).all()


def test_an_index_that_ends_early_is_refused() -> None:
    series, index = random_walk(days=60), random_walk(days=60, seed=1, symbol="INDEX")
    with pytest.raises(DataError, match="INDEX has no price for the 28 days before"):
        index_return_covariates(series.dates, index.take(slice(0, 40)))
    with pytest.raises(DataError, match=r"INDEX begins on .*, after the last of these days"):
        index_return_covariates(series.dates[:10], index.take(slice(20, None)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda dates, _: calendar_covariates(dates[::-1]), "dates must be there, and each after the one before"),
        (lambda dates, _: calendar_covariates(dates, (0,)), "horizons must be 1 or more trading days, got 0"),
        (lambda dates, _: calendar_covariates(dates, (1,), weekmask="1"), "weekmask seven of 0 and 1"),
        (lambda dates, _: calendar_covariates(dates, (1,), holidays=["Easter"]), "holidays must be dates"),
        (lambda dates, index: index_return_covariates(dates, index, lag=-1), "lag must be 0 or more"),
        (lambda dates, index: index_return_covariates(dates, index, (0,)), "windows must be 1 or more"),
        (
            lambda dates, index: index_return_covariates(dates, replace(index, prices=-index.prices)),
            "must be positive and finite",
        ),
    ],
)
def test_what_can_not_be_is_refused(call, words: str) -> None:
    index = random_walk(days=30)
    with pytest.raises(DataError, match=words):
        call(index.dates, index)


def test_appended_columns_stand_right_of_the_features_and_make_windows() -> None:
    series, index = random_walk(), random_walk(seed=1, symbol="INDEX")
    engineer = TimeSeriesFeatureEngineer()
    features, names = append_covariates(
        engineer.extract_features(series.prices),
        engineer.names,
        calendar_covariates(series.dates, (1, 30)),
        index_return_covariates(series.dates, index),
    )
    assert features.shape == (len(series), len(names))
    assert names[: len(engineer.names)] == engineer.names
    assert names[-1] == "index_return_20"
    X, _ = SequenceGenerator(60, (1, 30)).generate_sequences(features, series.prices)
    assert X.shape[2] == len(names)
    assert np.isfinite(X).all()


def test_two_columns_of_one_name_and_other_days_are_refused() -> None:
    series = random_walk(days=50)
    calendar = calendar_covariates(series.dates)
    with pytest.raises(DataError, match="two columns are called day_of_week_sin"):
        append_covariates(np.zeros((50, 1)), ["a"], calendar, calendar)
    with pytest.raises(DataError, match="day_of_week_sin has 50 days, the features have 49"):
        append_covariates(np.zeros((49, 1)), ["a"], calendar)
