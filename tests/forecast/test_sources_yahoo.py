"""Yahoo through a stand-in for yfinance: what is asked, what is kept, and what is said when it does not answer."""

import sys
import time
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.forecast.price_files import assert_same_prices, listed, shares

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceWarning
from mambakit.forecast.sources import SourceUnreachable, open_source
from mambakit.forecast.sources.yahoo import YahooSource

AAPL = listed(symbol="AAPL")


# Named as yfinance names its own: that is what a caller can know them by.
class YFException(Exception):
    pass


class YFRateLimitError(YFException):
    pass


class YFTickerMissingError(YFException):
    pass


class YFPricesMissingError(YFTickerMissingError):
    pass


class HTTPError(OSError):
    """As curl_cffi and requests raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP Error {status}")
        self.response = SimpleNamespace(status_code=status)


class FakeYahoo(ModuleType):
    """Answers each request with the next of `answers`: a frame, or an exception to raise."""

    def __init__(self) -> None:
        super().__init__("yfinance")
        self.answers: list[Any] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.metadata: dict[str, Any] = {}
        self.config = SimpleNamespace(debug=SimpleNamespace(hide_exceptions=True))

    def set_tz_cache_location(self, folder: str) -> None:
        self.cache = folder

    def Ticker(self, symbol: str) -> Any:
        return SimpleNamespace(history=lambda **options: self._answer(symbol, options), history_metadata=self.metadata)

    def _answer(self, symbol: str, options: dict[str, Any]) -> pd.DataFrame:
        assert not self.config.debug.hide_exceptions  # or the real one prints its errors and returns nothing
        self.asked.append((symbol, options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def frame(days: int | None = None) -> pd.DataFrame:
    """As `Ticker.history(auto_adjust=False, actions=False)` gives it."""
    index = pd.DatetimeIndex(AAPL.dates, name="Date").tz_localize("America/New_York")
    columns = {"Open": AAPL.closes, "Close": AAPL.closes, "Adj Close": AAPL.prices, "Volume": shares(AAPL)}
    return pd.DataFrame(columns, index=index)[:days]


@pytest.fixture
def yahoo(monkeypatch: pytest.MonkeyPatch) -> FakeYahoo:
    fake = FakeYahoo()
    monkeypatch.setitem(sys.modules, "yfinance", fake)
    return fake


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def source(yahoo: FakeYahoo, tmp_path: Path, pauses: list[float]) -> YahooSource:
    return YahooSource(tmp_path / "cache", sleep=pauses.append)


def test_closes_adjusted_closes_and_shares_come_through(yahoo: FakeYahoo, source: YahooSource) -> None:
    yahoo.answers = [frame()]
    found = source.fetch(["AAPL"], None)["AAPL"]
    assert_same_prices(found, AAPL)
    np.testing.assert_array_equal(found.closes, AAPL.closes)
    ((symbol, options),) = yahoo.asked
    assert symbol == "AAPL"
    assert options == {"period": "max", "interval": "1d", "auto_adjust": False, "actions": False}


def test_a_symbol_costs_one_request_for_however_many_days(
    yahoo: FakeYahoo, source: YahooSource, tmp_path: Path
) -> None:
    yahoo.answers = [frame()]
    first = source.fetch(["AAPL"], None)["AAPL"]
    again = YahooSource(tmp_path / "cache").fetch(["AAPL"], 20)["AAPL"]
    assert again.fingerprint == first.last(20).fingerprint
    np.testing.assert_array_equal(again.closes, first.closes[-20:])
    assert len(yahoo.asked) == 1


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal_where_it_is_asked_for(
    yahoo: FakeYahoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, progress: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take the captured stream for a terminal
    yahoo.answers = [frame(), frame()]
    YahooSource(tmp_path, progress=progress).fetch(["AAPL", "MSFT"], None)
    out, err = capsys.readouterr()
    assert ("Yahoo Finance" in err) == progress
    assert not out


def test_nothing_is_written_but_the_cache(yahoo: FakeYahoo, source: YahooSource, tmp_path: Path) -> None:
    yahoo.answers = [frame()]
    source.fetch(["AAPL"], None)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["cache", "cache/AAPL.parquet"]
    assert Path(yahoo.cache).parent == tmp_path / "cache"  # yfinance's own


def test_prices_are_fetched_again_once_they_are_stale(yahoo: FakeYahoo, tmp_path: Path) -> None:
    yahoo.answers = [frame(100), frame()]
    source = YahooSource(tmp_path, keep=timedelta(0))
    assert len(source.fetch(["AAPL"], None)["AAPL"]) == 100
    assert len(source.fetch(["AAPL"], None)["AAPL"]) == len(AAPL)


def test_a_damaged_cache_is_fetched_again(yahoo: FakeYahoo, source: YahooSource) -> None:
    yahoo.answers = [frame(), frame()]
    source.fetch(["AAPL"], None)
    (source.cache / "AAPL.parquet").write_bytes(b"PAR1 and then a power cut")
    assert_same_prices(source.fetch(["AAPL"], None)["AAPL"], AAPL)
    assert len(yahoo.asked) == 2


@pytest.mark.parametrize(
    ("symbol", "asked"), [("BRK.B", "BRK-B"), ("BRK-B", "BRK-B"), ("VOD.L", "VOD.L"), ("7203.T", "7203.T")]
)
def test_classes_of_shares_are_spelt_as_yahoo_spells_them(
    yahoo: FakeYahoo, source: YahooSource, symbol: str, asked: str
) -> None:
    yahoo.answers = [frame()]
    assert source.fetch([symbol], None)[symbol].symbol == symbol
    assert yahoo.asked[0][0] == asked


def test_too_many_requests_are_met_with_ever_longer_pauses(
    yahoo: FakeYahoo, source: YahooSource, pauses: list[float]
) -> None:
    yahoo.answers = [*(YFRateLimitError("Too Many Requests") for _ in range(3)), HTTPError(429), frame()]
    with pytest.warns(PriceWarning, match=r"AAPL: Yahoo Finance has had too many requests; waiting \d+ s"):
        assert_same_prices(source.fetch(["AAPL"], None)["AAPL"], AAPL)
    for attempt, pause in enumerate(pauses):
        assert 0.5 * 2.0 * 2**attempt <= pause <= 1.5 * 2.0 * 2**attempt
    assert len(pauses) == 4


@pytest.mark.filterwarnings("ignore:AAPL")
def test_pauses_are_not_the_same_for_everybody(yahoo: FakeYahoo, tmp_path: Path) -> None:
    first_pauses = []
    for name in "ab":
        yahoo.answers = [YFRateLimitError("Too Many Requests"), frame()]
        YahooSource(tmp_path / name, sleep=first_pauses.append).fetch(["AAPL"], None)
    assert first_pauses[0] != first_pauses[1]


@pytest.mark.filterwarnings("ignore:AAPL")
def test_patience_ends(yahoo: FakeYahoo, tmp_path: Path) -> None:
    yahoo.answers = [YFRateLimitError("Too Many Requests") for _ in range(3)]
    with pytest.raises(SourceUnreachable, match=r"refused 3 requests .* try again later"):
        YahooSource(tmp_path, attempts=3, sleep=lambda _: None).fetch(["AAPL"], None)
    assert not yahoo.answers


@pytest.mark.parametrize("answer", [YFPricesMissingError("$ZZZZ: possibly delisted"), frame(0), HTTPError(404)])
def test_a_symbol_that_yahoo_does_not_have_is_named(yahoo: FakeYahoo, source: YahooSource, answer: Any) -> None:
    yahoo.answers = [answer]
    with pytest.raises(DataError, match="Yahoo Finance has no daily prices of ZZZZ") as error:
        source.fetch(["ZZZZ"], None)
    assert not isinstance(error.value, SourceUnreachable)


def test_offline_the_way_out_is_one_line(yahoo: FakeYahoo, source: YahooSource) -> None:
    yahoo.answers = [ConnectionError("Could not resolve host\nquery2.finance.yahoo.com")]
    with pytest.raises(SourceUnreachable, match=r"cannot reach Yahoo Finance .*: connect to the internet, or") as error:
        source.fetch(["AAPL"], None)
    assert "\n" not in str(error.value)


def test_offline_older_prices_serve_and_say_their_age(yahoo: FakeYahoo, tmp_path: Path) -> None:
    yahoo.answers = [frame(), ConnectionError("no route")]
    source = YahooSource(tmp_path, keep=timedelta(0))
    source.fetch(["AAPL"], None)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    with pytest.warns(PriceWarning, match=f"AAPL: cannot reach Yahoo .*; using the prices cached on {day}"):
        assert_same_prices(source.fetch(["AAPL"], None)["AAPL"], AAPL)


def test_an_answer_that_is_none_is_yahoos_fault(yahoo: FakeYahoo, source: YahooSource) -> None:
    yahoo.answers = [ValueError("Expecting value: line 1 column 1")]
    with pytest.raises(SourceUnreachable, match="does not work at present"):
        source.fetch(["AAPL"], None)


def test_a_fault_of_ours_is_not_yahoos(yahoo: FakeYahoo, source: YahooSource) -> None:
    yahoo.answers = [TypeError("history() got an unexpected keyword argument")]
    with pytest.raises(TypeError):
        source.fetch(["AAPL"], None)
    assert yahoo.config.debug.hide_exceptions  # as it was found


@pytest.mark.parametrize(("hours", "finished"), [(1, False), (-1, True)])
def test_a_day_that_has_not_closed_is_left_out(
    yahoo: FakeYahoo, source: YahooSource, monkeypatch: pytest.MonkeyPatch, hours: int, finished: bool
) -> None:
    closing = frame().index[-1] + pd.Timedelta(hours=16)
    yahoo.metadata = {"currentTradingPeriod": {"regular": {"end": closing}}}
    yahoo.answers = [frame()]
    now = closing.timestamp() - hours * 3600
    monkeypatch.setattr(time, "time", lambda: now)
    assert len(source.fetch(["AAPL"], None)["AAPL"]) == len(AAPL) - (not finished)


def test_a_last_row_without_a_price_is_left_out_and_others_are_not(yahoo: FakeYahoo, source: YahooSource) -> None:
    holed = frame()
    holed.iloc[[20, -1]] = np.nan
    yahoo.answers = [holed]
    found = source.fetch(["AAPL"], None)["AAPL"]
    assert np.flatnonzero(np.isnan(found.prices)).tolist() == [20]
    assert len(found) == len(AAPL) - 1


def test_without_yfinance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yfinance", None)
    with pytest.raises(DataError, match=r"needs the package yfinance: pip install 'mambakit\[live\]'"):
        open_source("yahoo")


def test_the_cache_is_in_the_users_folder_unless_another_is_named(
    yahoo: FakeYahoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("where the folder is differs between systems; this is Linux's")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert YahooSource().cache == tmp_path / "mambakit" / "yahoo"
    assert not list(tmp_path.iterdir())  # not before there is something to keep


def test_the_real_yfinance_has_what_is_asked_of_it() -> None:
    yfinance = pytest.importorskip("yfinance")
    import inspect

    options = inspect.signature(yfinance.Ticker.history).parameters
    accepts_any = any(option.kind is option.VAR_KEYWORD for option in options.values())
    assert accepts_any or {"period", "interval", "auto_adjust", "actions"} <= options.keys()
    assert hasattr(yfinance.config.debug, "hide_exceptions")
    assert callable(yfinance.set_tz_cache_location)
    assert issubclass(yfinance.exceptions.YFRateLimitError, Exception)
    assert issubclass(yfinance.exceptions.YFPricesMissingError, yfinance.exceptions.YFTickerMissingError)
