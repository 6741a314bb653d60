"""`mambakit forecast backtest` and `report`, in processes of their own, on the built-in prices."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from tests.cli.command_line import SMALL, assert_one_line_error, mambakit
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.forecast.baselines import BASELINES
from mambakit.forecast.outofsample import read_records
from mambakit.training.artefacts import verify_folder

WALK = ["--folds", "2", "--step", "20", "--baselines", "quick"]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A small backtest of two symbols, and what it printed."""
    where = tmp_path_factory.mktemp("walked")
    arguments = ["forecast", "backtest", "--symbols", "aapl,IBM", *SMALL, "--days", "520", *WALK]
    return where, mambakit(*arguments, cwd=where, fresh=True)


def test_a_backtest_prints_scores_summary_and_criteria(walked) -> None:
    _, done = walked
    assert done.returncode == 0, done.stderr
    for name in ("mamba", *BASELINES):
        assert len(re.findall(rf"^ \d+d +{name}  .*$", done.stdout, re.MULTILINE)) == 2 * 4
    assert len(re.findall(r"^(PASS|FAIL|UNKNOWN) +.+: .+$", done.stdout, re.MULTILINE)) == 12
    assert re.search(r"^Verdict: the model .*$", done.stdout, re.MULTILINE)
    assert "Where the model has skill" in done.stdout


def test_a_backtest_stores_every_prediction_in_the_next_free_folder(walked) -> None:
    where, done = walked
    folder = where / "backtests" / "1"
    verify_folder(folder)
    assert f"Stored as {folder.relative_to(where)}" in done.stdout
    records = read_records(folder / "predictions.parquet")
    assert [record.symbol for record in records] == ["AAPL", "IBM"]
    assert all(len(record.dates) == 40 for record in records)
    stored = json.loads((folder / "backtest.json").read_text())
    assert stored["settings"]["walk_forward"]["step"] == 20


def test_a_backtest_says_which_fit_is_under_way(walked) -> None:
    lines = [line for line in walked[1].stderr.splitlines() if line]
    assert lines == [f"{symbol}: fit {fit} of 2" for symbol in ("AAPL", "IBM") for fit in (1, 2)]


def test_a_report_of_a_backtest_is_one_page(walked, tmp_path: Path) -> None:
    done = mambakit("forecast", "report", "--run", walked[0] / "backtests" / "1", "--out", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"Wrote {tmp_path / 'r.html'}"
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") == 6  # two fans, two courses, PIT, reliability


def test_a_symbol_that_fails_costs_the_others_nothing_and_is_told_by_the_exit_status(tmp_path: Path) -> None:
    # GOOG has fewer days than these folds need, AAPL more.
    arguments = ["--symbols", "AAPL,GOOG", *SMALL, "--days", "3270", "--folds", "1", "--step", "1950", "--quiet"]
    done = mambakit("forecast", "backtest", *arguments, "--baselines", "drift", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert re.fullmatch(r"GOOG failed: .*take fewer or shorter folds, or a longer window\n", done.stderr)
    assert "Stored as" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["backtest"], "--symbols"),
        (["backtest", "--symbols", " , "], "names no symbol"),
        (["backtest", "--symbols", "AAPL", "--folds", "0"], "--folds"),
        (["backtest", "--symbols", "AAPL", "--calibration", "magic"], "none, conformal or adaptive"),
        (["backtest", "--symbols", "AAPL", "--out", "."], "--out"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments: list[str], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["forecast", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr


def test_an_unknown_baseline_and_a_folder_that_is_no_run_are_named(tmp_path: Path) -> None:
    done = mambakit("forecast", "backtest", "--symbols", "AAPL", "--baselines", "prophet", cwd=tmp_path)
    assert_one_line_error(done, "prophet", "garch walk")
    assert list(tmp_path.iterdir()) == []
    assert_one_line_error(mambakit("forecast", "report", "--run", tmp_path), str(tmp_path), "forecast train")
