"""Build the prices that ship inside the package: bokeh_sampledata's public-domain stocks as one small Parquet file.

    pip install bokeh_sampledata==2026.1
    python tools/make_builtin_prices.py

writes `src/mambakit/forecast/data/prices.parquet` and, beside it, `README.md` with the provenance.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bokeh_sampledata import stocks

SYMBOLS = ("AAPL", "GOOG", "IBM", "MSFT")  # FB has only 196 days, too few for a 30-day horizon
TARGET = Path(__file__).parent.parent / "src" / "mambakit" / "forecast" / "data"

PROVENANCE = """# Built-in prices

`prices.parquet`: daily open, high, low, close, volume and adjusted close of {symbols}.

- **Source:** `bokeh_sampledata` {version}, module `stocks` (the Quandl WIKI prices, read from an archived copy).
- **Licence:** public domain; Quandl declared it so and permitted redistribution (the docstring of
  `bokeh_sampledata.stocks` links the notice).
- **Values:** open, high, low, close and volume are as traded, not adjusted for splits. `adj_close` is the source's
  closing price adjusted for splits and dividends, those after the last day included. `GOOG` holds Google's only
  class of shares before 2014, today's GOOGL.
- **Storage:** prices as traded are float32 (exact again when rounded to four decimals), `adj_close` is float64 as the
  source gives it, volume int64, dates date32. Compressed with zstd.

| symbol | first day | last day | rows |
|---|---|---|---|
{rows}

SHA-256 of `prices.parquet`: `{digest}`

Rebuilt by `python tools/make_builtin_prices.py`, which also writes this file.
"""


def symbol_table(symbol: str) -> pa.Table:
    """One symbol's rows in the order of their dates."""
    data = getattr(stocks, symbol)
    columns = {
        "symbol": pa.array([symbol] * len(data["date"])),
        "date": pa.array(np.array(data["date"], dtype="datetime64[D]")),
        **{name: pa.array(data[name], pa.float32()) for name in ("open", "high", "low", "close")},
        "volume": pa.array(data["volume"], pa.int64()),
        "adj_close": pa.array(data["adj_close"], pa.float64()),
    }
    return pa.table(columns)


def main() -> None:
    """Write the Parquet file and its provenance."""
    tables = [symbol_table(symbol) for symbol in SYMBOLS]
    TARGET.mkdir(parents=True, exist_ok=True)
    path = TARGET / "prices.parquet"
    # Splitting the bytes of floats, and storing differences of days, is what lets zstd find the repetitions.
    encoding = {
        "date": "DELTA_BINARY_PACKED",
        "volume": "DELTA_BINARY_PACKED",
        **dict.fromkeys(("open", "high", "low", "close", "adj_close"), "BYTE_STREAM_SPLIT"),
    }
    compression = {"compression": "zstd", "compression_level": 19}
    with pq.ParquetWriter(
        path, tables[0].schema, use_dictionary=["symbol"], column_encoding=encoding, **compression
    ) as writer:
        for table in tables:  # one row group a symbol, so that a reader touches no other
            writer.write_table(table)
    rows = "\n".join(
        f"| {symbol} | {table['date'][0]} | {table['date'][-1]} | {len(table)} |"
        for symbol, table in zip(SYMBOLS, tables, strict=True)
    )
    text = PROVENANCE.format(
        symbols=", ".join(SYMBOLS),
        version=version("bokeh_sampledata"),
        rows=rows,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    (TARGET / "README.md").write_text(text, encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
