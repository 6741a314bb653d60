"""`mambakit forecast predict` in production: fallback, log and challenger; and `mambakit forecast models`."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.cli.command_line import SMALL, assert_one_line_error, mambakit
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.forecast.prediction_log import PredictionLog

Trained = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture
def models(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained models, in which AAPL has v1 in production and v2 beside it."""
    copy = Path(shutil.copytree(trained[0], tmp_path / "models", ignore=shutil.ignore_patterns("predictions*")))
    shutil.copytree(copy / "AAPL" / "v1", copy / "AAPL" / "v2")
    return copy


def run(*arguments: object) -> tuple[int, str, str]:
    """A light command, in this process: status, stdout and stderr."""
    done = CliRunner().invoke(app, ["forecast", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_without_a_model_the_fallback_answers_and_the_line_says_so(models: Path) -> None:
    done = mambakit("forecast", "predict", "IBM", "--models", models)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(ast.literal_eval(done.stdout.splitlines()[0])) == ["1d", "5d", "10d", "30d"]
    assert "IBM fallback, as of 2013-03-01" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fallback: no model of IBM in ")


def test_a_damaged_model_is_named_and_the_fallback_answers_as_json(models: Path) -> None:
    (models / "AAPL" / "v1" / "model.safetensors").write_bytes(b"")
    done = mambakit("forecast", "predict", "AAPL", "--models", models, "--json")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert (whole["source"], whole["arm"], whole["skill"]) == ("fallback", "fallback", None)
    assert "model.safetensors is not what was written" in whole["reason"]


def test_predictions_are_logged_beside_the_models_once(models: Path) -> None:
    for _ in range(2):
        assert mambakit("forecast", "predict", "AAPL", "--models", models).returncode == 0
    assert len(PredictionLog(models / "predictions.sqlite").frame()) == 4
    assert {path.name for path in models.iterdir()} == {"AAPL", "GOOGL", "predictions.sqlite"}


def test_a_log_is_written_where_it_is_wanted_or_nowhere(models: Path, tmp_path: Path) -> None:
    assert mambakit("forecast", "predict", "AAPL", "--models", models, "--log", tmp_path / "a.sqlite").returncode == 0
    assert len(PredictionLog(tmp_path / "a.sqlite").frame()) == 4
    assert mambakit("forecast", "predict", "AAPL", "--models", models, "--no-log").returncode == 0
    assert not (models / "predictions.sqlite").exists()


def test_no_folder_is_made_for_the_log_alone(tmp_path: Path) -> None:
    assert mambakit("forecast", "predict", "AAPL", "--models", tmp_path / "models").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_costs_one_line_and_no_forecast(models: Path) -> None:
    done = mambakit("forecast", "predict", "AAPL", "--models", models, "--log", models)
    assert done.returncode == 0
    assert "AAPL v1" in done.stdout
    assert done.stderr.startswith("mambakit: warning: the prediction is not logged: cannot write ")
    assert len(done.stderr.splitlines()) == 1


def test_the_challenger_is_shown_to_whom_it_falls(models: Path) -> None:
    assert run("models", "challenge", "AAPL", "v2", "--models", models)[0] == 0
    done = mambakit("forecast", "predict", "AAPL", "--models", models, "--ab", "1")
    assert "AAPL v2 (challenger), as of" in done.stdout
    frame = PredictionLog(models / "predictions.sqlite").frame()
    assert frame.groupby("version").shown.first().to_dict() == {"v1": False, "v2": True}


def test_models_are_listed_promoted_rolled_back_and_deleted(models: Path) -> None:
    folder = ("--models", models)
    assert run("models", "challenge", "aapl", "v2", *folder) == (0, "AAPL: challenger is v2\n", "")
    assert run("models", "promote", "AAPL", *folder) == (0, "AAPL: production is v2, it was v1\n", "")
    assert run("models", "promote", "AAPL", "v2", *folder) == (0, "AAPL: v2 is production already\n", "")
    assert run("models", "rollback", "AAPL", *folder) == (0, "AAPL: production is v1 again, it was v2\n", "")
    status, table, _ = run("models", "list", *folder)
    assert status == 0
    rows = [line.split() for line in table.splitlines() if line.startswith((" AAPL", " GOOGL"))]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("AAPL", "v1", "ok"),
        ("AAPL", "v2", "ok"),
        ("GOOGL", "v1", "ok"),
    ]
    assert rows[0][2] == "production"
    assert run("models", "delete", "AAPL", "v2", *folder) == (0, "AAPL: v2 is deleted; production is v1\n", "")
    listed = json.loads(run("models", "list", "AAPL", "--json", *folder)[1])
    assert [row["version"] for row in listed] == ["v1"]
    assert listed[0]["data_until"] == "2013-03-01"


def test_verifying_ends_with_status_1_where_a_file_was_changed(models: Path) -> None:
    assert run("models", "verify", "--models", models) == (0, "3 versions are what was written\n", "")
    (models / "AAPL" / "v2" / "README.md").write_text("changed")
    status, said, _ = run("models", "verify", "AAPL", "--models", models)
    assert status == 1
    assert "README.md is not what was written" in said
    assert "damaged" in run("models", "list", "--models", models)[1]


def test_deleting_what_serves_is_refused_in_one_line(models: Path) -> None:
    done = mambakit("forecast", "models", "delete", "AAPL", "v1", "--models", models)
    assert_one_line_error(done, "AAPL v1 is production", "--force")


def test_a_version_is_trained_as_the_challenger_and_what_may_help_is_said(models: Path) -> None:
    train = ("forecast", "train", "--symbols", "GOOGL", *SMALL, "--out", models, "--store-as", "challenger")
    done = mambakit(*train)
    assert done.returncode == 0, done.stderr
    assert "What may help: GOOGL: train on more than these 430 days" in done.stdout
    listed = json.loads(run("models", "list", "GOOGL", "--json", "--models", models)[1])
    assert [row["aliases"] for row in listed] == [["production"], ["challenger"]]


def test_an_empty_folder_is_no_error_and_says_how_to_fill_it(tmp_path: Path) -> None:
    status, said, _ = run("models", "list", "--models", tmp_path)
    assert status == 0
    assert "train one with: mambakit forecast train" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "AAPL", "--log", "a", "--no-log"], "either --log or --no-log"),
        (["predict", "AAPL", "--key", "a"], "give"),
        (["predict", "AAPL", "--ab", "1.5"], "--ab"),
        (["train", "--test", "--store-as", "best"], "--store-as"),
        (["models", "challenge", "AAPL"], "either a version or --withdraw"),
        (["models", "challenge", "AAPL", "v1", "--withdraw"], "either a version or --withdraw"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments: list[str], words: str) -> None:
    status, _, errors = run(*arguments)
    assert status == 2
    assert words in errors
