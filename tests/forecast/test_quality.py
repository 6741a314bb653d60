"""Every way in which a series can be unfit, and the words for it."""

from dataclasses import replace

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceWarning
from mambakit.forecast.quality import require_quality, validate_data_quality

FIFTIETH = "2010-03-15"  # the date of row 50 of the walk


@pytest.fixture
def prices(make_series) -> np.ndarray:
    return make_series(days=200).prices.copy()


def test_good_prices_pass(prices: np.ndarray) -> None:
    assert validate_data_quality(prices) == (True, "ok")


def test_too_few_samples_are_counted(prices: np.ndarray) -> None:
    assert validate_data_quality(prices[:99]) == (False, "99 days of prices are too few, at least 100 are needed")
    assert validate_data_quality(prices[:100])[0]


def test_missing_prices_are_counted_against_the_ratio(prices: np.ndarray) -> None:
    prices[30:40] = np.nan  # exactly 5%
    assert validate_data_quality(prices)[0]
    prices[40] = np.nan
    assert validate_data_quality(prices) == (False, "11 of 200 prices are missing (NaN), the first at row 30")


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.inf, "infinite"), (0.0, "not positive"), (-3.0, r"not positive, the first at row 17 \(-3\)")],
)
def test_a_single_impossible_price_is_found(prices: np.ndarray, value: float, words: str) -> None:
    prices[17] = value
    usable, reason = validate_data_quality(prices)
    assert not usable
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reason)


def test_prices_that_do_not_move_are_refused() -> None:
    assert validate_data_quality(np.full(200, 12.5)) == (False, "the prices do not move")


def test_a_table_of_prices_is_refused(prices: np.ndarray) -> None:
    assert "one-dimensional" in validate_data_quality(prices.reshape(100, 2))[1]


def test_a_series_may_stand_for_its_prices(make_series) -> None:
    assert validate_data_quality(make_series(days=200)) == (True, "ok")
    series = make_series(days=200)
    series.prices[3] = 0.0
    assert "not positive" in validate_data_quality(series)[1]


def test_a_few_days_without_a_price_are_left_out_never_filled(make_series) -> None:
    series = make_series(days=200)
    series.prices[[50, 199]] = np.nan
    assert validate_data_quality(series)[0]
    with pytest.warns(PriceWarning, match=f"WALK: 2 of 200 days have no price and are left out, the first {FIFTIETH}"):
        usable = require_quality(series, min_samples=100)
    kept = np.delete(np.arange(200), [50, 199])
    np.testing.assert_array_equal(usable.prices, series.prices[kept])
    np.testing.assert_array_equal(usable.dates, series.dates[kept])
    np.testing.assert_array_equal(usable.volumes, series.volumes[kept])


def test_a_complete_series_is_handed_back_as_it_is(make_series) -> None:
    series = make_series(days=200)
    assert require_quality(series, min_samples=100) is series


def test_more_missing_days_than_allowed_are_refused(make_series) -> None:
    series = make_series(days=200)
    series.prices[50:61] = np.nan
    with pytest.raises(DataError, match="WALK: 11 of 200 prices are missing"):
        require_quality(series, min_samples=100)


def test_days_without_a_price_do_not_count_as_samples(make_series) -> None:
    series = make_series(days=200)
    series.prices[7] = np.nan
    with pytest.raises(DataError, match="WALK: 199 days with a price are too few, at least 200"):
        require_quality(series, min_samples=200)


def test_dates_must_increase(make_series) -> None:
    series = make_series(days=200)
    swapped = series.dates.copy()
    swapped[[10, 11]] = swapped[[11, 10]]
    with pytest.raises(DataError, match=f"dates must increase, but {swapped[11]}"):
        require_quality(replace(series, dates=swapped), min_samples=100)


def test_a_date_that_is_there_twice_is_named(make_series) -> None:
    series = make_series(days=200)
    dates = series.dates.copy()
    dates[90] = dates[89]
    assert validate_data_quality(replace(series, dates=dates)) == (
        False,
        f"{dates[89]} is there more than once; one price a day is expected",
    )


def test_a_missing_date_is_no_date(make_series) -> None:
    series = make_series(days=200)
    dates = series.dates.copy()
    dates[90] = np.datetime64("NaT")
    assert validate_data_quality(replace(series, dates=dates)) == (False, "1 days have no date")


@pytest.mark.parametrize(("weekdays", "passes"), [(10, True), (11, False)])
def test_a_gap_of_more_than_ten_weekdays_is_named(make_series, weekdays: int, passes: bool) -> None:
    series = make_series(days=400)
    gapped = series.take(np.delete(np.arange(400), np.arange(100, 100 + weekdays)))
    usable, reason = validate_data_quality(gapped)
    assert usable == passes
    if not passes:
        assert f"between {series.dates[99]} and {series.dates[111]}, a gap of 11 weekdays" in reason


def test_weekly_prices_are_not_daily_ones(make_series) -> None:
    weekly = make_series(days=1000).take(slice(None, None, 5))
    usable, reason = validate_data_quality(weekly)
    assert not usable
    assert "80% of the weekdays" in reason


def test_prices_of_every_day_of_the_week_pass(make_series) -> None:
    series = make_series(days=200)
    every_day = np.datetime64("2010-01-01") + np.arange(200)
    assert validate_data_quality(replace(series, dates=every_day)) == (True, "ok")


@pytest.mark.parametrize("volume", [np.inf, -1.0])
def test_impossible_volumes_are_refused(make_series, volume: float) -> None:
    series = make_series(days=200)
    series.volumes[5] = volume
    with pytest.raises(DataError, match="volumes must be finite and not negative, row 5"):
        require_quality(series, min_samples=100)


def test_unknown_volumes_are_no_fault(make_series) -> None:
    series = make_series(days=200)
    assert validate_data_quality(replace(series, volumes=np.full(200, np.nan))) == (True, "ok")


def test_a_split_is_reported_with_its_day_and_the_way_out(make_series) -> None:
    series = make_series(days=200)
    split = replace(series, prices=series.prices * np.where(np.arange(200) < 150, 4.0, 1.0))
    split.volumes[:150] /= 4
    usable, reason = validate_data_quality(split)
    assert not usable
    assert f"on {series.dates[150]} looks like a 4:1 split" in reason
    assert "give adjusted closes" in reason
    assert validate_data_quality(split, check_splits=False) == (True, "ok")


def test_bare_prices_are_looked_at_for_splits_too(make_series) -> None:
    series = make_series(days=200)
    prices = series.prices * np.where(np.arange(200) < 150, 10.0, 1.0)
    assert "row 150 looks like a 10:1 split" in validate_data_quality(prices)[1]


@pytest.mark.parametrize("close", [np.inf, 0.0])
def test_impossible_closes_as_traded_are_refused_and_missing_ones_are_not(make_series, close: float) -> None:
    series = make_series(days=200)
    closes = 1.01 * series.prices
    closes[5] = np.nan
    assert validate_data_quality(replace(series, closes=closes)) == (True, "ok")
    closes[9] = close
    assert (
        "closes as traded must be finite and positive, row 9"
        in validate_data_quality(replace(series, closes=closes))[1]
    )
