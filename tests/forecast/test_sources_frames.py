"""Data frames of pandas, polars and pyarrow give the same series, whatever their shape."""

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from tests.forecast.price_files import assert_same_prices, listed, shares

from mambakit.errors import DataError
from mambakit.forecast import FrameSource, fetch_historical_prices, read_frame

AAPL, MSFT = listed(symbol="AAPL"), listed(seed=1, symbol="MSFT")
MAKERS = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "pyarrow": pa.table}
each_library = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def ohlcv(dates: Any = AAPL.dates) -> dict[str, Any]:
    return {"Date": dates, "Close": AAPL.closes, "Adj Close": AAPL.prices, "Volume": shares(AAPL)}


@each_library
def test_one_symbol_is_named_by_its_caller(make) -> None:
    found = read_frame(make(ohlcv()), symbol="AAPL")
    assert list(found) == ["AAPL"]
    assert_same_prices(found["AAPL"], AAPL)
    np.testing.assert_array_equal(found["AAPL"].closes, AAPL.closes)


@each_library
def test_nixtlas_long_frame_holds_many_symbols(make) -> None:
    frame = make(
        {
            "unique_id": ["MSFT"] * len(MSFT) + ["AAPL"] * len(AAPL),
            "ds": np.concatenate([MSFT.dates, AAPL.dates]),
            "y": np.concatenate([MSFT.prices, AAPL.prices]),
        }
    )
    found = read_frame(frame)
    assert_same_prices(found["AAPL"], AAPL, volumes=False)
    assert_same_prices(found["MSFT"], MSFT, volumes=False)
    assert list(read_frame(frame, symbol="MSFT")) == ["MSFT"]


@each_library
def test_rows_of_symbols_may_take_turns(make) -> None:
    pairs = [
        (name, day, price) for name in ("AAPL", "MSFT") for day, price in zip(AAPL.dates, AAPL.prices, strict=True)
    ]
    pairs.sort(key=lambda row: row[1])
    names, days, prices = zip(*pairs, strict=True)
    found = read_frame(make({"ticker": list(names), "date": np.array(days), "close": list(prices)}))
    np.testing.assert_array_equal(found["MSFT"].prices, AAPL.prices)
    np.testing.assert_array_equal(found["MSFT"].dates, AAPL.dates)


@each_library
def test_a_column_for_each_symbol_is_read_too(make) -> None:
    found = read_frame(make({"Date": AAPL.dates, "AAPL": AAPL.prices, "MSFT": MSFT.prices}))
    assert_same_prices(found["AAPL"], AAPL, volumes=False)
    assert_same_prices(found["MSFT"], MSFT, volumes=False)


@each_library
def test_missing_prices_are_nan(make) -> None:
    prices: list[float | None] = AAPL.prices.tolist()
    prices[5] = None
    found = read_frame(make({"ds": AAPL.dates, "y": prices}), symbol="AAPL")["AAPL"]
    assert np.flatnonzero(np.isnan(found.prices)).tolist() == [5]


@each_library
@pytest.mark.parametrize(
    "dates", [AAPL.dates.astype("datetime64[ns]"), AAPL.dates.astype(str).tolist()], ids=["times", "texts"]
)
def test_dates_may_be_times_or_texts(make, dates: Any) -> None:
    assert_same_prices(read_frame(make(ohlcv(dates)), symbol="AAPL")["AAPL"], AAPL)


def test_a_pandas_frame_may_have_its_days_in_the_index() -> None:
    """As yfinance gives them, with the time zone of the exchange."""
    frame = pd.DataFrame(ohlcv()).set_index("Date")
    assert_same_prices(read_frame(frame, symbol="AAPL")["AAPL"], AAPL)
    frame.index = pd.DatetimeIndex(AAPL.dates).tz_localize("Asia/Tokyo")  # the day before in Greenwich
    assert_same_prices(read_frame(frame, symbol="AAPL")["AAPL"], AAPL)


@pytest.mark.parametrize("fields_first", [True, False])
def test_two_levels_of_columns_are_read(fields_first: bool) -> None:
    columns = {}
    for series in (AAPL, MSFT):
        for field, values in (("Adj Close", series.prices), ("Close", series.closes), ("Volume", shares(series))):
            columns[(field, series.symbol) if fields_first else (series.symbol, field)] = values
    frame = pd.DataFrame(columns, index=pd.DatetimeIndex(AAPL.dates, name="Date"))
    found = read_frame(frame)
    assert_same_prices(found["AAPL"], AAPL)
    assert_same_prices(found["MSFT"], MSFT)
    assert list(read_frame(frame, symbol="MSFT")) == ["MSFT"]


def test_numbers_that_pandas_may_leave_out_are_read() -> None:
    frame = pd.DataFrame(ohlcv()).convert_dtypes()
    frame.loc[3, "Adj Close"] = pd.NA
    found = read_frame(frame, symbol="AAPL")["AAPL"]
    assert np.flatnonzero(np.isnan(found.prices)).tolist() == [3]
    np.testing.assert_array_equal(found.prices[4:], AAPL.prices[4:])


def test_the_frame_is_not_changed() -> None:
    frame = pd.DataFrame(ohlcv())
    before = frame.copy()
    found = read_frame(frame, symbol="AAPL")["AAPL"]
    found.prices[0] = -1.0
    pd.testing.assert_frame_equal(frame, before)


def test_nobodys_prices_are_refused() -> None:
    with pytest.raises(DataError, match="no column says whose prices these are"):
        read_frame(pl.DataFrame(ohlcv()))


@pytest.mark.parametrize("value", [pl.LazyFrame(ohlcv()), {"Date": [1]}, AAPL.prices])
def test_what_is_no_frame_is_refused(value: Any) -> None:
    with pytest.raises(
        DataError, match=f"expected a data frame of pandas, polars or pyarrow .* {type(value).__name__}"
    ):
        read_frame(value, symbol="AAPL")


def test_missing_dates_are_counted() -> None:
    dates = [None, *AAPL.dates[1:].tolist()]
    with pytest.raises(DataError, match="1 rows have no date"):
        read_frame(pl.DataFrame(ohlcv(dates)), symbol="AAPL")


def test_a_frame_without_a_price_names_its_columns() -> None:
    with pytest.raises(DataError, match=r"expected a date .* found the columns Date, Comment"):
        read_frame(pl.DataFrame({"Date": AAPL.dates, "Comment": ["-"] * len(AAPL)}), symbol="AAPL")


def test_a_frame_is_a_source_like_any_other() -> None:
    source = FrameSource(pl.DataFrame(ohlcv()), symbol="aapl")
    assert source.symbols() == ("AAPL",)
    assert_same_prices(fetch_historical_prices(["AAPL"], 30, source=source)["AAPL"], AAPL.last(30))
    with pytest.raises(DataError, match="no prices for MSFT in the data frame; there are AAPL"):
        fetch_historical_prices(["MSFT"], source=source)
