"""The benchmark of forecasts: its series, its processes, and that it says what was met and what was not."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.warm_processes import run_module

from benchmarks import prices
from mambakit.forecast.backtest import Backtest
from mambakit.forecast.quality import require_quality

TINY = ["--epochs", "1", "--d-model", "4", "--layers", "1", "--workers", "1", "--quick"]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return run_module("benchmarks.forecasts", *map(str, arguments), cwd=None, environment=environment)


@pytest.mark.slow
def test_every_criterion_is_answered_and_the_exit_status_is_theirs(tmp_path: Path) -> None:
    done = benchmark("--symbols", "GOOG", *TINY, "--json", tmp_path / "all.json", "--save", tmp_path / "run")
    answers = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL", "UNKNOWN"))]
    assert len(answers) == 12
    assert done.returncode == (0 if set(answers) == {"PASS"} else 1), done.stderr
    stored = json.loads((tmp_path / "all.json").read_text())
    words = {True: "PASS", False: "FAIL", None: "UNKNOWN"}
    assert [words[each["passed"]] for each in stored["criteria"]] == answers
    assert list(stored["summaries"]) == ["none", "conformal", "adaptive", "conformal, then adaptive"]
    assert [record.symbol for record in Backtest.load(tmp_path / "run").records] == ["GOOG"]


def test_an_unknown_symbol_is_named_before_anything_is_trained() -> None:
    done = benchmark("--symbols", "GOOG,ZZZZ", *TINY)
    assert done.returncode == 1
    assert done.stderr.startswith("no prices of ZZZZ; there are AAPL, GOOG")


def test_without_skfolio_its_symbols_are_none(monkeypatch) -> None:
    monkeypatch.setattr("mambakit.forecast.sources.skfolio.find_spec", lambda package: None)
    assert prices.skfolio_names() == []


@pytest.mark.skipif(not prices.skfolio_names(), reason="skfolio, which brings the series, is not installed")
def test_skfolios_series_are_fit_to_be_forecast() -> None:
    symbols = prices.skfolio_names()
    assert len(symbols) == 20
    series = prices.read_series("JNJ-SKF")
    require_quality(series, 8000)
    assert (str(series.dates[0]), str(series.dates[-1])) == ("1990-01-02", "2022-12-28")
    assert np.abs(np.diff(np.log(series.prices))).max() < 0.4
