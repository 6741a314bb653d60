"""The built-in prices, and what counts as a symbol."""

import hashlib
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, fetch_historical_prices, parse_symbol


@pytest.mark.parametrize(
    ("symbol", "first", "days"),
    [
        ("AAPL", "2000-03-01", 3270),
        ("MSFT", "2000-03-01", 3270),
        ("IBM", "2000-03-01", 3270),
        ("GOOG", "2004-08-19", 2148),
    ],
)
def test_a_builtin_series_has_its_documented_days(symbol: str, first: str, days: int) -> None:
    series = fetch_historical_prices([symbol])[symbol]
    assert (str(series.dates[0]), str(series.dates[-1]), len(series)) == (first, "2013-03-01", days)
    assert (np.diff(series.dates.astype(int)) > 0).all()


def test_builtin_prices_are_the_adjusted_closes_of_their_source() -> None:
    stocks = pytest.importorskip("bokeh_sampledata.stocks")
    for symbol in ("AAPL", "GOOG", "IBM", "MSFT"):
        source = getattr(stocks, symbol)
        series = fetch_historical_prices([symbol])[symbol]
        np.testing.assert_array_equal(series.prices, source["adj_close"])
        np.testing.assert_array_equal(series.dates.astype(str), source["date"])
        turnover = np.array(source["volume"]) * np.array(source["close"])
        np.testing.assert_allclose(series.prices * series.volumes, turnover, rtol=1e-6)  # closes are float32


def test_the_provenance_names_the_file_that_is_there() -> None:
    data = files("mambakit.forecast") / "data"
    digest = hashlib.sha256((data / "prices.parquet").read_bytes()).hexdigest()
    assert digest in (data / "README.md").read_text(encoding="utf-8")


def test_an_alias_gives_the_same_prices_under_the_name_that_was_asked_for() -> None:
    both = fetch_historical_prices(["GOOG", "googl"])
    assert list(both) == ["GOOG", "GOOGL"]
    assert both["GOOGL"].symbol == "GOOGL"
    assert both["GOOGL"].fingerprint == both["GOOG"].fingerprint


def test_days_keeps_the_last_ones() -> None:
    whole = fetch_historical_prices(["IBM"])["IBM"]
    last = fetch_historical_prices(["IBM"], days=10)["IBM"]
    np.testing.assert_array_equal(last.prices, whole.prices[-10:])
    np.testing.assert_array_equal(last.dates, whole.dates[-10:])
    np.testing.assert_array_equal(last.volumes, whole.volumes[-10:])


def test_more_days_than_there_are_gives_all() -> None:
    assert len(fetch_historical_prices(["GOOG"], days=10**6)["GOOG"]) == 2148


def test_an_unknown_symbol_is_named_with_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"ZZZZ.*there are AAPL, GOOG, GOOGL, IBM, MSFT"):
        fetch_historical_prices(["AAPL", "ZZZZ"])


@pytest.mark.parametrize("text", ["", ".", "..", "../AAPL", "A/B", "A\\B", "a b", "AAPL\n.", "-A", "1A", "A" * 11, "Ä"])
def test_what_could_leave_a_folder_is_no_symbol(text: str) -> None:
    with pytest.raises(DataError, match="not a symbol"):
        parse_symbol(text)


@pytest.mark.parametrize(("text", "symbol"), [(" aapl ", "AAPL"), ("BRK.B", "BRK.B"), ("rds-a", "RDS-A")])
def test_a_symbol_is_read_in_capitals(text: str, symbol: str) -> None:
    assert parse_symbol(text) == symbol


@pytest.mark.parametrize("field", ["dates", "prices", "volumes"])
def test_the_fingerprint_changes_with_any_single_number(make_series, field: str) -> None:
    series = make_series(days=20)
    values = getattr(series, field).copy()
    values[7] = values[8]
    assert replace(series, **{field: values}).fingerprint != series.fingerprint


def test_a_series_with_days_missing_in_one_column_is_refused(make_series) -> None:
    series = make_series(days=20)
    with pytest.raises(DataError, match="20, 19 and 20"):
        PriceSeries("X", series.dates, series.prices[1:], series.volumes)
