"""`mambakit forecast data`, and where prices come from: `--source` and `--symbols`, from the command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tests.cli.command_line import SMALL, assert_one_line_error, mambakit

from mambakit.cli import main
from mambakit.forecast import TIER_1, fetch_historical_prices

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mambakit ARGUMENTS` within this process, which has paid for its imports."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["mambakit", *map(str, arguments)])
        status: int | str | None = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(status or 0), out, err)

    return call


def write_closes(folder: Path, symbol: str, rename: str | None = None) -> np.ndarray:
    """The built-in prices of a symbol as a file with the adjusted close alone; returns its rows of text."""
    series = fetch_historical_prices([symbol])[symbol]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{day},{price!r}" for day, price in zip(series.dates, series.prices.tolist(), strict=True)]
    (folder / f"{rename or symbol}.csv").write_text("\n".join(["Date,Adj Close", *rows]) + "\n")
    return np.array(rows)


def test_the_builtin_symbols_are_listed_with_their_days_and_a_verdict(run: Run) -> None:
    done = run("forecast", "data")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1] == ["AAPL", "3270", "2000-03-01", "2013-03-01", "-", "yes", "ok"]
    assert [row[0] for row in rows[1:]] == ["AAPL", "GOOG", "GOOGL", "IBM", "MSFT"]


def test_a_folder_is_listed_with_what_is_wrong_in_it(run: Run, tmp_path: Path) -> None:
    rows = write_closes(tmp_path, "IBM", rename="GOOD")
    rows[700] = rows[700].split(",")[0] + ","
    (tmp_path / "HOLED.csv").write_text("\n".join(["Date,Adj Close", *rows]) + "\n")
    (tmp_path / "SHORT.csv").write_text("\n".join(["Date,Adj Close", *rows[:50]]) + "\n")
    (tmp_path / "notes.txt").write_text("nothing of interest\n")
    done = run("forecast", "data", "--source", tmp_path)
    assert done.returncode == 1
    lines = {line.split()[0]: line.strip().split(maxsplit=6) for line in done.stdout.splitlines()}
    assert lines["GOOD"][4:] == ["-", "no", "ok"]
    assert lines["HOLED"][4:] == ["1", "no", "ok"]
    assert lines["SHORT"][6].startswith("50 days of prices are too few, at least 100")
    assert "notes.txt: expected a date" in done.stdout


def test_a_symbol_that_is_not_there_does_not_hide_the_others(run: Run) -> None:
    done = run("forecast", "data", "--symbols", "IBM,ZZZZ", "--days", 200)
    assert done.returncode == 1
    ibm = next(line.split() for line in done.stdout.splitlines() if "IBM" in line)
    assert (ibm[1], ibm[-1]) == ("200", "ok")
    assert "no prices for ZZZZ in the built-in prices" in " ".join(done.stdout.split())


def test_training_and_predicting_from_a_folder(run: Run, tmp_path: Path) -> None:
    write_closes(tmp_path / "prices", "IBM")
    symbols = tmp_path / "mine.txt"
    symbols.write_text("# one will do\nibm\n")
    out = ["--source", tmp_path / "prices", "--out", tmp_path / "models", "--quiet"]
    done = run("forecast", "train", "--symbols", f"@{symbols}", *out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "IBM/v1" in done.stdout
    predict = ["forecast", "predict", "IBM", "--models", tmp_path / "models"]
    from_folder = mambakit(*predict, "--source", tmp_path / "prices")  # in a process of its own, as its imports differ
    assert from_folder.returncode == 0, from_folder.stderr
    assert from_folder.stdout.startswith("{'1d': ")
    assert from_folder.stdout == run(*predict).stdout  # the same prices, the same forecast


def test_days_without_a_price_are_told_of_in_one_line(tmp_path: Path) -> None:
    rows = write_closes(tmp_path / "prices", "IBM")
    rows[-5] = rows[-5].split(",")[0] + ","
    (tmp_path / "prices" / "IBM.csv").write_text("\n".join(["Date,Adj Close", *rows]) + "\n")
    options = ["--symbols", "IBM", "--source", tmp_path / "prices", "--out", tmp_path / "models", "--quiet"]
    done = mambakit("forecast", "train", *options, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "mambakit: warning: IBM: 1 of 430 days have no price and are left out, the first 2013-02-25\n"
    )


def test_a_split_that_was_not_adjusted_for_stops_a_training(run: Run, tmp_path: Path) -> None:
    series = fetch_historical_prices(["MSFT"])["MSFT"]
    rows = [f"{day},{close}" for day, close in zip(series.dates, series.closes, strict=True)]
    (tmp_path / "MSFT.csv").write_text("\n".join(["Date,Close", *rows]) + "\n")
    done = run("forecast", "train", "--symbols", "MSFT", "--source", tmp_path, "--out", tmp_path / "models")
    assert_one_line_error(done, "MSFT: the move of -48.3% on 2003-02-18 looks like a 2:1 split")


def test_tier_1_from_the_package_names_some_that_are_missing(run: Run, tmp_path: Path) -> None:
    done = run("forecast", "train", "--symbols", "TIER_1", "--out", tmp_path / "models")
    missing = [symbol for symbol in TIER_1 if symbol not in ("AAPL", "MSFT", "GOOGL", "IBM")]
    assert_one_line_error(done, f"no prices for {', '.join(missing[:10])} and {len(missing) - 10} more")


def test_a_source_that_is_none_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("forecast", "data", "--source", tmp_path / "away")
    assert_one_line_error(done, "no source of prices", "expected builtin, skfolio, yahoo, or the path")


@pytest.fixture
def offline_yahoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """yfinance without a network, and the cache in a folder of the test's."""

    class Ticker:
        def __init__(self, symbol: str) -> None:
            pass

        def history(self, **_: object) -> None:
            raise ConnectionError("no route to host")

    yfinance = ModuleType("yfinance")
    yfinance.config = SimpleNamespace(debug=SimpleNamespace(hide_exceptions=True))
    yfinance.set_tz_cache_location = lambda folder: None
    yfinance.Ticker = Ticker
    monkeypatch.setitem(sys.modules, "yfinance", yfinance)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_yahoo_offline_is_one_line(run: Run, offline_yahoo: None) -> None:
    done = run("forecast", "data", "--source", "yahoo", "--symbols", "AAPL,MSFT")
    assert_one_line_error(
        done, "cannot reach Yahoo Finance (ConnectionError): connect to the internet, or name a folder"
    )


def test_symbols_of_yahoo_must_be_named(run: Run, offline_yahoo: None) -> None:
    done = run("forecast", "data", "--source", "yahoo")
    assert done.returncode == 2
    assert "yahoo can't list its symbols" in done.stderr
