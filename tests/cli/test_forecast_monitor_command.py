"""`mambakit forecast monitor` and `ab` on the built-in prices, replayed."""

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from tests.cli.command_line import assert_one_line_error, mambakit
from typer.testing import CliRunner

from mambakit.cli import app

Trained = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture
def models(trained: Trained, tmp_path: Path) -> Path:
    """AAPL alone, v1 in production and its copy v2 the challenger."""
    source = trained[0] / "AAPL"
    shutil.copytree(source, tmp_path / "models" / "AAPL", ignore=shutil.ignore_patterns("v[2-9]"))
    shutil.copytree(source / "v1", tmp_path / "models" / "AAPL" / "v2")
    assert run("models", "challenge", "AAPL", "v2", "--models", tmp_path / "models")[0] == 0
    return tmp_path / "models"


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["forecast", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_monitoring_replayed_forecasts_shows_accuracy_calibration_inputs_and_a_verdict(models: Path) -> None:
    done = mambakit("forecast", "monitor", "--models", models, "--replay")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("AAPL v1: ")
    assert " days replayed, " in first
    assert "promised" in done.stdout
    assert "chance explains" in done.stdout
    assert "inputs need " in done.stdout or "Inputs: " in done.stdout
    assert last.startswith("AAPL v1")
    assert "(" in last


def test_a_second_look_joins_nothing_twice_and_exports_the_log(models: Path, tmp_path: Path) -> None:
    assert run("monitor", "AAPL", "--models", models, "--replay", "--quiet")[0] == 0
    status, said, _ = run("monitor", "AAPL", "--models", models, "--export", tmp_path / "log.parquet")
    assert status == 0
    assert said.startswith("AAPL v1: 0 outcomes joined, ")
    frame = pd.read_parquet(tmp_path / "log.parquet")
    assert frame.outcome.notna().sum() == len(frame) - (1 + 5 + 10 + 30)
    assert frame.replayed.all()


def test_decay_is_told_and_ends_a_check_with_status_3(models: Path) -> None:
    assert run("monitor", "AAPL", "--models", models, "--replay", "--quiet", "--check")[0] in (0, 3)
    connection = sqlite3.connect(models / "predictions.sqlite")
    with connection:
        connection.execute("UPDATE predictions SET outcome = 10 * abs(outcome) + 0.1 WHERE horizon = 1")
    connection.close()
    status, said, _ = run("monitor", "AAPL", "--models", models, "--check", "--quiet")
    assert status == 3
    assert said.startswith("AAPL v1 has decayed (")
    assert "interval at 1d held 0%" in said
    assert run("monitor", "AAPL", "--models", models, "--quiet")[0] == 0  # only a check is strict
    whole = json.loads(run("monitor", "AAPL", "--models", models, "--json")[1])
    assert whole[0]["decayed"] is True
    assert whole[0]["horizons"][0]["horizon"] == 1


def test_monitoring_without_any_prediction_says_how_to_make_some(models: Path) -> None:
    done = mambakit("forecast", "monitor", "AAPL", "--models", models)
    assert_one_line_error(done, "no predictions in", "monitor --replay")
    assert not (models / "predictions.sqlite").exists()


def test_a_model_and_its_copy_have_no_winner(models: Path) -> None:
    status, said, _ = run("ab", "--models", models, "--replay")
    assert status == 0
    assert "AAPL: production v1, challenger v2" in said
    assert said.splitlines()[-1] == "AAPL: no winner yet; both go on"
    results = json.loads(run("ab", "AAPL", "--models", models, "--json")[1])
    assert [each["winner"] for each in results[0]["results"]] == [None] * 4
    assert results[0]["results"][0]["days"] > 0


def test_a_challenger_that_always_hits_wins_and_is_to_be_promoted(models: Path) -> None:
    run("ab", "--models", models, "--replay")
    connection = sqlite3.connect(models / "predictions.sqlite")
    with connection:
        hindsight = connection.execute(
            "SELECT json_array(outcome, outcome, outcome), forecast FROM predictions JOIN forecasts ON forecast = id "
            "WHERE version = 'v2' AND horizon = 1 AND outcome IS NOT NULL"
        ).fetchall()
        connection.execute("UPDATE predictions SET quantiles = '[0, 0, 0]'")
        connection.execute("UPDATE forecasts SET levels = '[0.1, 0.5, 0.9]'")
        connection.executemany("UPDATE predictions SET quantiles = ? WHERE forecast = ? AND horizon = 1", hindsight)
    connection.close()
    _, said, _ = run("ab", "AAPL", "--models", models)
    assert "the challenger is better at 1d" in said.splitlines()[-1]
    assert "promote it with: mambakit forecast models promote AAPL" in said.splitlines()[-1]


def test_without_a_challenger_the_comparison_says_how_to_choose_one(models: Path) -> None:
    run("models", "challenge", "AAPL", "--withdraw", "--models", models)
    done = mambakit("forecast", "ab", "--models", models)
    assert_one_line_error(done, "no challenger", "mambakit forecast models challenge SYMBOL VERSION")


def test_a_model_that_cannot_be_read_is_named_and_stops_no_other(models: Path) -> None:
    shutil.copytree(models / "AAPL", models / "IBM")
    (models / "IBM" / "v1" / "model.safetensors").write_bytes(b"damaged")
    status, out, error = run("monitor", "--models", models, "--replay", "--quiet")
    assert status == 1
    assert "model.safetensors" in error
    assert len(error.splitlines()) == 1
    assert out.startswith("AAPL v1")
