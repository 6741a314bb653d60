"""Every way in which a series can be unfit, and the words for it."""

from dataclasses import replace

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast.quality import require_quality, validate_data_quality


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


def test_a_real_crash_is_no_error(prices: np.ndarray) -> None:
    prices[100:] *= 0.48  # AAPL lost 51.9% on 2000-09-29
    assert validate_data_quality(prices)[0]


def test_training_allows_no_gap_at_all(make_series) -> None:
    series = make_series(days=200)
    series.prices[50] = np.nan
    with pytest.raises(DataError, match="WALK: 1 of 200 prices are missing"):
        require_quality(series, min_samples=100)


def test_dates_must_increase(make_series) -> None:
    series = make_series(days=200)
    swapped = series.dates.copy()
    swapped[[10, 11]] = swapped[[11, 10]]
    with pytest.raises(DataError, match=f"dates must increase, but {swapped[11]}"):
        require_quality(replace(series, dates=swapped), min_samples=100)


@pytest.mark.parametrize("volume", [np.nan, -1.0])
def test_impossible_volumes_are_refused(make_series, volume: float) -> None:
    series = make_series(days=200)
    series.volumes[5] = volume
    with pytest.raises(DataError, match="volumes"):
        require_quality(series, min_samples=100)
