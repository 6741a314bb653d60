"""Files of prices as their sources write them, made from a series."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.forecast.walks import random_walk

from mambakit.forecast.prices import PriceSeries

DIVIDEND = 0.97  # what adjusting takes off the closes before the middle of the series


def listed(days: int = 130, seed: int = 0, symbol: str = "WALK") -> PriceSeries:
    """A walk in cents, as files have it, with a dividend halfway."""
    walk = random_walk(days=days, seed=seed, symbol=symbol)
    closes = walk.prices.round(2)
    prices = (closes * np.where(np.arange(days) < days // 2, DIVIDEND, 1.0)).round(6)
    shares = walk.volumes.round()
    return PriceSeries(symbol, walk.dates, prices, shares * closes / prices, closes)


def shares(series: PriceSeries) -> np.ndarray:
    """As traded, in whole numbers."""
    return (series.volumes * series.prices / series.closes).round().astype(int)


def rows(series: PriceSeries) -> list[tuple[str, float, float, int]]:
    """Date, close, adjusted close and volume of each day."""
    return [
        (str(date), float(close), float(price), int(volume))
        for date, close, price, volume in zip(series.dates, series.closes, series.prices, shares(series), strict=True)
    ]


def yahoo(series: PriceSeries) -> str:
    lines = ["Date,Open,High,Low,Close,Adj Close,Volume"]
    lines += [f"{day},{close},{close},{close},{close},{price},{volume}" for day, close, price, volume in rows(series)]
    return "\n".join(lines) + "\n"


def yfinance_two_levels(*every: PriceSeries, by_ticker: bool = False) -> str:
    """What `yfinance.download(...).to_csv()` writes, either way of grouping."""
    columns = [(field, series.symbol) for field in ("Adj Close", "Close", "Volume") for series in every]
    if by_ticker:
        columns.sort(key=lambda column: column[1])
    fields = ",".join(["Price", *(field for field, _ in columns)])
    tickers = ",".join(["Ticker", *(ticker for _, ticker in columns)])
    lines = [tickers, fields] if by_ticker else [fields, tickers]
    lines.append("Date" + "," * len(columns))
    values = {series.symbol: rows(series) for series in every}
    position = {"Close": 1, "Adj Close": 2, "Volume": 3}
    for place, day in enumerate(every[0].dates):
        numbers = [str(values[ticker][place][position[field]]) for field, ticker in columns]
        lines.append(",".join([str(day), *numbers]))
    return "\n".join(lines) + "\n"


def stooq_bulk(series: PriceSeries) -> str:
    """Stooq's files of all symbols: brackets, and dates without dashes."""
    lines = ["<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>"]
    lines += [
        f"{series.symbol}.US,D,{day.replace('-', '')},000000,{close},{close},{close},{close},{volume},0"
        for day, close, _, volume in rows(series)
    ]
    return "\n".join(lines) + "\n"


def nixtla(*every: PriceSeries) -> str:
    lines = ["unique_id,ds,y"]
    lines += [f"{series.symbol},{day},{price}" for series in every for day, _, price, _ in rows(series)]
    return "\n".join(lines) + "\n"


def side_by_side(*every: PriceSeries) -> str:
    lines = ["," + ",".join(series.symbol for series in every)]
    for place, day in enumerate(every[0].dates):
        lines.append(",".join([str(day), *(str(series.prices[place]) for series in every)]))
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> Path:
    """To a text file, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, series: PriceSeries) -> Path:
    columns = {"Date": series.dates, "Close": series.closes, "Adj Close": series.prices, "Volume": shares(series)}
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path


def assert_same_prices(found: PriceSeries, expected: PriceSeries, *, volumes: bool = True) -> None:
    """Dates, prices and, unless the source has none, volumes of adjusted shares."""
    assert found.symbol == expected.symbol
    np.testing.assert_array_equal(found.dates, expected.dates)
    np.testing.assert_array_equal(found.prices, expected.prices)
    if volumes:
        np.testing.assert_allclose(found.volumes, expected.volumes, rtol=1e-12)
    else:
        assert np.isnan(found.volumes).all()
