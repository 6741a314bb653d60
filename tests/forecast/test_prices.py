"""The built-in prices, and what counts as a symbol."""

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast.prices import (
    PriceSeries,
    fetch_historical_prices,
    fetch_historical_prices_async,
    parse_symbol,
)


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


def test_a_symbol_asked_for_twice_is_there_once() -> None:
    assert list(fetch_historical_prices(["ibm", "AAPL", "IBM"])) == ["IBM", "AAPL"]


@pytest.mark.parametrize("days", [0, -5])
def test_less_than_one_day_is_refused(days: int) -> None:
    with pytest.raises(DataError, match=f"days must be 1 or more, got {days}"):
        fetch_historical_prices(["IBM"], days=days)


def test_one_text_is_no_list_of_symbols() -> None:
    with pytest.raises(DataError, match=r"a list such as \['AAPL'\]"):
        fetch_historical_prices("AAPL")


def test_fetching_works_with_and_without_await() -> None:
    async def fetch() -> list[dict[str, PriceSeries]]:
        return [await fetch_historical_prices(["AAPL"], 20), await fetch_historical_prices_async(["AAPL"], 20)]

    plain = fetch_historical_prices(["AAPL"], 20)
    assert type(dict(plain)) is dict
    for awaited in asyncio.run(fetch()):
        assert awaited["AAPL"].fingerprint == plain["AAPL"].fingerprint


def test_the_event_loop_goes_on_while_prices_are_fetched() -> None:
    started, ended = threading.Event(), threading.Event()

    class WaitingSource:
        name = "waiting"

        def symbols(self) -> tuple[str, ...]:
            return ("AAPL",)

        def fetch(self, symbols: Sequence[str], days: int | None) -> dict[str, PriceSeries]:
            started.set()
            assert ended.wait(30)  # only a loop that is free can end it
            return fetch_historical_prices(symbols, days)

    async def fetch_and_end() -> dict[str, PriceSeries]:
        fetching = asyncio.create_task(fetch_historical_prices_async(["AAPL"], source=WaitingSource()))
        while not started.is_set():
            await asyncio.sleep(0.001)
        ended.set()
        return await fetching

    assert list(asyncio.run(fetch_and_end())) == ["AAPL"]


def test_a_series_is_its_prices_to_numpy(make_series) -> None:
    series = make_series(days=20)
    np.testing.assert_array_equal(np.asarray(series), series.prices)
    assert np.asarray(series, dtype=np.float32).dtype == np.float32
    copy = np.array(series)
    copy[0] = -1
    assert series.prices[0] > 0


def test_the_builtin_closes_as_traded_show_the_splits() -> None:
    closes = fetch_historical_prices(["AAPL"])["AAPL"].closes
    assert closes is not None
    assert closes[0] == 130.31
    assert (np.diff(np.log(closes)) < -0.5).sum() == 3  # two splits and a crash


def test_an_unknown_symbol_is_named_with_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"ZZZZ.*there are AAPL, GOOG, GOOGL, IBM, MSFT"):
        fetch_historical_prices(["AAPL", "ZZZZ"])


@pytest.mark.parametrize(
    "text", ["", ".", "..", "../AAPL", "A/B", "A\\B", "a b", "AAPL\n.", "-A", "^", "A^", "A" * 11, "Ä"]
)
def test_what_could_leave_a_folder_is_no_symbol(text: str) -> None:
    with pytest.raises(DataError, match="not a symbol"):
        parse_symbol(text)


@pytest.mark.parametrize(
    ("text", "symbol"),
    [(" aapl ", "AAPL"), ("BRK.B", "BRK.B"), ("rds-a", "RDS-A"), ("7203.t", "7203.T"), ("^gspc", "^GSPC")],
)
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


def test_closes_of_another_length_are_refused(make_series) -> None:
    series = make_series(days=20)
    with pytest.raises(DataError, match="closes must have one entry a day, got 19 for 20"):
        replace(series, closes=series.prices[1:])
