"""Files of prices in every usual spelling, and the one line that says what is wrong with a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tests.forecast.price_files as price_files
from tests.forecast.price_files import assert_same_prices, listed, write

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, fetch_historical_prices
from mambakit.forecast.sources import PriceSource, open_source
from mambakit.forecast.sources.folder import FolderSource

AAPL, MSFT = listed(symbol="AAPL"), listed(seed=1, symbol="MSFT")
CLOSES_ONLY = replace(AAPL, prices=AAPL.closes, volumes=price_files.shares(AAPL).astype(float), closes=None)


def fetch_aapl(path: Path) -> PriceSeries:
    return fetch_historical_prices(["AAPL"], source=str(path))["AAPL"]


def without(text: str, column: str) -> str:
    """CSV text with one column left out."""
    table = [line.split(",") for line in text.splitlines()]
    place = table[0].index(column)
    return "\n".join(",".join(row[:place] + row[place + 1 :]) for row in table) + "\n"


@pytest.mark.parametrize("name", ["AAPL.csv", "aapl.csv", "aapl.us.txt", "AAPL.csv.gz", "deep/below/AAPL.csv"])
def test_yahoos_file_gives_both_closes_and_the_shares_behind_them(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, price_files.yahoo(AAPL))
    found = fetch_aapl(tmp_path)
    assert_same_prices(found, AAPL)
    np.testing.assert_array_equal(found.closes, AAPL.closes)


@pytest.mark.parametrize(
    "change",
    [
        str.lower,
        lambda text: text.replace("Adj Close", "Adj. Close"),
        lambda text: text.replace("Adj Close", "adjusted"),
    ],
)
def test_case_and_punctuation_of_columns_do_not_matter(tmp_path: Path, change) -> None:
    write(tmp_path / "AAPL.csv", change(price_files.yahoo(AAPL)))
    assert_same_prices(fetch_aapl(tmp_path), AAPL)


def test_a_lone_close_is_the_price(tmp_path: Path) -> None:
    """What yfinance gives with auto_adjust, and Stooq for a single symbol."""
    write(tmp_path / "AAPL.csv", without(price_files.yahoo(AAPL), "Adj Close"))
    found = fetch_aapl(tmp_path)
    assert_same_prices(found, CLOSES_ONLY)
    assert found.closes is None


def test_prices_without_volumes_have_unknown_ones(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", without(price_files.yahoo(AAPL), "Volume"))
    assert_same_prices(fetch_aapl(tmp_path), AAPL, volumes=False)


def test_stooqs_bulk_files_are_read_from_the_depth_of_their_folders(tmp_path: Path) -> None:
    write(tmp_path / "daily" / "us" / "nasdaq stocks" / "1" / "aapl.us.txt", price_files.stooq_bulk(AAPL))
    write(tmp_path / "daily" / "us" / "nasdaq stocks" / "2" / "msft.us.txt", price_files.stooq_bulk(MSFT))
    assert FolderSource(tmp_path).symbols() == ("AAPL", "MSFT")
    assert_same_prices(fetch_aapl(tmp_path), CLOSES_ONLY)


@pytest.mark.parametrize("as_file", [True, False])
def test_nixtlas_long_table_holds_many_symbols(tmp_path: Path, as_file: bool) -> None:
    path = write(tmp_path / "everything_in_one.csv", price_files.nixtla(MSFT, AAPL))
    source = FolderSource(path if as_file else tmp_path)
    assert source.symbols() == ("AAPL", "MSFT")
    both = source.fetch(["MSFT", "AAPL"], None)
    assert_same_prices(both["AAPL"], AAPL, volumes=False)
    assert_same_prices(both["MSFT"], MSFT, volumes=False)


def test_a_column_for_each_symbol_is_read_too(tmp_path: Path) -> None:
    path = write(tmp_path / "closes_of_many.csv", price_files.side_by_side(AAPL, MSFT))
    assert FolderSource(path).symbols() == ("AAPL", "MSFT")
    assert_same_prices(fetch_aapl(path), AAPL, volumes=False)


@pytest.mark.parametrize("by_ticker", [False, True])
def test_yfinances_two_rows_of_headings_are_read(tmp_path: Path, by_ticker: bool) -> None:
    path = write(tmp_path / "down_loaded.csv", price_files.yfinance_two_levels(AAPL, MSFT, by_ticker=by_ticker))
    source = FolderSource(path)
    assert source.symbols() == ("AAPL", "MSFT")
    for expected in (AAPL, MSFT):
        assert_same_prices(source.fetch([expected.symbol], None)[expected.symbol], expected)


def test_the_headings_of_older_yfinance_are_read(tmp_path: Path) -> None:
    text = price_files.yfinance_two_levels(AAPL, MSFT).replace("Price", "", 1).replace("Ticker", "", 1)
    assert_same_prices(fetch_aapl(write(tmp_path / "down_loaded.csv", text)), AAPL)


def test_parquet_is_read_like_text(tmp_path: Path) -> None:
    price_files.write_parquet(tmp_path / "AAPL.parquet", AAPL)
    found = fetch_aapl(tmp_path)
    assert_same_prices(found, AAPL)
    np.testing.assert_array_equal(found.closes, AAPL.closes)


def test_parquet_that_pandas_wrote_keeps_its_index(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"Adj Close": AAPL.prices}, index=pd.DatetimeIndex(AAPL.dates))
    frame.to_parquet(tmp_path / "AAPL.parquet")
    assert_same_prices(fetch_aapl(tmp_path), AAPL, volumes=False)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_are_noticed(tmp_path: Path, delimiter: str) -> None:
    write(tmp_path / "AAPL.csv", price_files.yahoo(AAPL).replace(",", delimiter))
    assert_same_prices(fetch_aapl(tmp_path), AAPL)


def test_a_file_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", "\ufeff" + price_files.yahoo(AAPL).replace("\n", "\r\n"))
    assert_same_prices(fetch_aapl(tmp_path), AAPL)


def test_nulls_are_days_without_a_price(tmp_path: Path) -> None:
    lines = price_files.yahoo(AAPL).splitlines()
    lines[8] = f"{AAPL.dates[7]},null,null,null,null,null,null"
    write(tmp_path / "AAPL.csv", "\n".join(lines))
    found = fetch_aapl(tmp_path)
    assert np.flatnonzero(np.isnan(found.prices)).tolist() == [7]
    assert len(found) == len(AAPL)


def test_dollars_and_thousands_are_numbers(tmp_path: Path) -> None:
    text = 'Date,Close/Last,Volume\n01/31/2020,"$1,309.51",27710810\n02/03/2020,$308.66,43496400\n'
    write(tmp_path / "AAPL.csv", text)
    found = fetch_aapl(tmp_path)
    assert found.prices.tolist() == [1309.51, 308.66]
    assert found.dates.astype(str).tolist() == ["2020-01-31", "2020-02-03"]


def test_shares_in_thousands_and_millions_are_numbers(tmp_path: Path) -> None:
    text = '"Date","Price","Open","Vol.","Change %"\n"01/31/2020","309.51","320.9","49.90M","-4.4%"\n'
    write(tmp_path / "AAPL.csv", text + '"01/30/2020","323.87","320.5","310.5K","-0.1%"\n')
    found = fetch_aapl(tmp_path)
    assert found.prices.tolist() == [323.87, 309.51]
    np.testing.assert_allclose(found.volumes, [310_500, 49_900_000])


def test_a_path_may_be_given_as_one(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", price_files.yahoo(AAPL))
    assert_same_prices(fetch_historical_prices(["AAPL"], source=tmp_path)["AAPL"], AAPL)


def test_the_newest_first_is_turned_round_and_any_other_order_is_not(tmp_path: Path) -> None:
    header, *days = price_files.yahoo(AAPL).splitlines()
    write(tmp_path / "AAPL.csv", "\n".join([header, *days[::-1]]))
    assert_same_prices(fetch_aapl(tmp_path), AAPL)
    write(tmp_path / "AAPL.csv", "\n".join([header, days[1], days[0], *days[2:]]))
    assert fetch_aapl(tmp_path).dates[0] == AAPL.dates[1]


def test_times_with_a_zone_keep_their_local_day(tmp_path: Path) -> None:
    """Midnight in Tokyo is the day before in Greenwich."""
    write(tmp_path / "7203.T.csv", "Date,Close\n2020-01-06 00:00:00+09:00,100\n2020-01-07 00:00:00+09:00,101\n")
    found = FolderSource(tmp_path).fetch(["7203.T"], None)["7203.T"]
    assert found.dates.astype(str).tolist() == ["2020-01-06", "2020-01-07"]


def test_a_symbol_that_reads_like_a_missing_value_or_a_truth_is_a_symbol(tmp_path: Path) -> None:
    path = write(tmp_path / "long_table.csv", "symbol,date,close\nNA,2020-01-06,1\nTRUE,2020-01-06,2\n")
    assert FolderSource(path).symbols() == ("NA", "TRUE")


def test_days_keeps_the_last_ones(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", price_files.yahoo(AAPL))
    assert_same_prices(FolderSource(tmp_path).fetch(["AAPL"], 7)["AAPL"], AAPL.last(7))


def test_other_files_in_the_folder_are_left_alone_and_told_of(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", price_files.yahoo(AAPL))
    notes = write(tmp_path / "notes.txt", "remember to buy milk\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    source = FolderSource(tmp_path)
    assert isinstance(source, PriceSource)
    assert source.symbols() == ("AAPL",)
    assert list(source.unusable) == [notes]


def test_an_unknown_symbol_is_named_with_those_that_exist(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"S{number:02}.csv", price_files.yahoo(AAPL))
    with pytest.raises(DataError, match=r"no prices for ZZZZ in .*; there are S00, S01, .*, S09 and 2 more$"):
        FolderSource(tmp_path).fetch(["S01", "ZZZZ"], None)


def test_a_symbol_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "AAPL.csv", price_files.yahoo(AAPL))
    write(tmp_path / "old" / "aapl.us.csv", price_files.yahoo(AAPL))
    with pytest.raises(DataError, match=r"AAPL is in .*AAPL\.csv and in .*aapl\.us\.csv; keep one"):
        fetch_aapl(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"expected a date \(Date, ds\), a close .*, found the columns none"),
        ("Date,Close\n", "found no row below the columns Date, Close"),
        ("Day of trade,Price paid\n2020-01-06,1\n", "found the columns Day of trade, Price paid"),
        ("Date,Close\nyesterday,1\n", "row 0 has the date 'yesterday', expected one like 2013-03-01"),
        ("Date,Close\n2020-01-06,1\n2020-13-07,1\n", "row 1 has the date '2020-13-07'"),
        ("Date,Close\n01/02/2020,1\n03/04/2020,1\n", "day and month can't be told apart"),
        ("Date,Close\n2020-01-06,1\n,1\n", "row 1 has the date ''"),
        ("Date,Close\n2020-01-06,much\n", "Close is 'much' in row 0, expected a number"),
        ("Date,Close,close\n2020-01-06,1,1\n", "columns 'Close' and 'close' are spelt alike"),
        ("Date,Close\n2020-01-06,1,7,9\n", "it can't be read"),
        ("unique_id,ds,y\nstore_1,2020-01-06,1\n", "'store_1' is not a symbol"),
        ("Date,AAPL,S&P 500\n2020-01-06,1,2\n", "'S&P 500' is not a symbol"),
        ("Date,Close\n,1\n2020-01-06,1\n", "row 0 has the date ''"),
    ],
)
def test_a_file_that_is_wrong_says_what_was_expected_and_found(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "AAPL.csv", text)
    with pytest.raises(DataError, match=words) as error:
        fetch_aapl(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["AAPL.parquet", "AAPL.csv.gz", "AAPL.csv"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01 no prices at all \x00\x00")
    with pytest.raises(DataError, match=rf"{name}: expected prices as CSV or Parquet, but it can't be read"):
        fetch_aapl(tmp_path)


def test_a_file_whose_symbol_nothing_tells_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "my closing prices.csv", price_files.yahoo(AAPL))
    with pytest.raises(DataError, match="no column names the symbol, and the file's name is none"):
        FolderSource(path).symbols()


def test_a_folder_without_such_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected files of prices \(\.csv, .*\), found none"):
        open_source(tmp_path)


def test_what_is_neither_a_source_nor_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source of prices 'googel': expected builtin, skfolio, yahoo, or the path"):
        open_source("googel")
    with pytest.raises(DataError, match="is not there"):
        FolderSource(tmp_path / "away")
