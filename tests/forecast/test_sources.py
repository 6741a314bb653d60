"""The sources that come with packages, and the protocol that all of them keep."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.forecast import fetch_historical_prices, open_source
from mambakit.forecast.sources import PriceSource

needs_skfolio = pytest.mark.skipif(find_spec("skfolio") is None, reason="needs skfolio, for its prices")


@pytest.mark.parametrize("name", ["builtin", pytest.param("skfolio", marks=needs_skfolio)])
def test_a_source_has_every_symbol_that_it_lists(name: str) -> None:
    source = open_source(name)
    assert isinstance(source, PriceSource)
    assert source.name == name
    symbols = source.symbols()
    assert symbols == tuple(sorted(symbols))
    fetched = source.fetch(symbols, 30)
    assert list(fetched) == list(symbols)
    assert {len(series) for series in fetched.values()} == {30}
    assert all(series.symbol == symbol for symbol, series in fetched.items())


@pytest.mark.parametrize("name", ["builtin", pytest.param("skfolio", marks=needs_skfolio)])
def test_an_unknown_symbol_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r"no prices for ZZZZ, YYYY in .*; there are AAPL, "):
        fetch_historical_prices(["ZZZZ", "AAPL", "YYYY"], source=name)


@needs_skfolio
def test_skfolio_has_twenty_shares_and_their_index() -> None:
    source = open_source("skfolio")
    assert len(source.symbols()) == 21
    fetched = fetch_historical_prices(["AAPL", "SP500"], source=source)
    for series in fetched.values():
        assert (str(series.dates[0]), str(series.dates[-1]), len(series)) == ("1990-01-02", "2022-12-28", 8313)
        assert np.isnan(series.volumes).all()


@needs_skfolio
def test_two_sources_agree_on_the_returns_of_a_share() -> None:
    builtin = fetch_historical_prices(["AAPL"])["AAPL"]
    other = fetch_historical_prices(["AAPL"], source="skfolio")["AAPL"]
    _, ours, theirs = np.intersect1d(builtin.dates, other.dates, return_indices=True)
    returns = [np.diff(np.log(series.prices[rows])) for series, rows in ((builtin, ours), (other, theirs))]
    assert np.corrcoef(returns)[0, 1] > 0.99


def test_without_skfolio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambakit.forecast.sources.skfolio.find_spec", lambda _: None)
    with pytest.raises(DataError, match="needs the package skfolio: pip install skfolio"):
        open_source("skfolio")


def test_another_object_with_the_three_members_is_a_source(make_series) -> None:
    class Walks:
        name = "walks"

        def symbols(self) -> None:
            return None

        def fetch(self, symbols, days):
            return {symbol: make_series(days=days, symbol=symbol) for symbol in symbols}

    assert isinstance(Walks(), PriceSource)
    fetched = fetch_historical_prices(["b", "a"], 50, source=Walks())
    assert {symbol: len(series) for symbol, series in fetched.items()} == {"B": 50, "A": 50}


def test_the_builtin_source_loads_neither_pandas_nor_other_sources() -> None:
    code = (
        "import sys\n"
        "from mambakit.forecast import fetch_historical_prices\n"
        "fetch_historical_prices(['AAPL'])\n"
        "heavy = ('pandas', 'polars', 'narwhals', 'yfinance', 'skfolio', 'platformdirs', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
