"""`mambakit forecast` from training to prediction, in processes of their own, on the built-in prices."""

import ast
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.command_line import SMALL, assert_one_line_error, command, environment, mambakit
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.forecast import MambaPredictor, fetch_historical_prices
from mambakit.training.artefacts import verify_folder

Trained = tuple[Path, subprocess.CompletedProcess[str]]


def test_training_stores_a_version_for_each_symbol_and_nothing_else(trained: Trained) -> None:
    models, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in models.iterdir()} - {"predictions.sqlite"} == {"AAPL", "GOOGL"}  # others' log
    for symbol in ("AAPL", "GOOGL"):
        assert {path.name for path in (models / symbol).iterdir()} == {"v1", "aliases.json"}
        assert json.loads((models / symbol / "aliases.json").read_text()) == {"production": "v1"}
        verify_folder(models / symbol / "v1")
        for figure in ("forecast.png", "evaluation.png"):
            assert (models / symbol / "v1" / figure).stat().st_size > 20_000


def test_training_prints_the_model_beside_every_baseline_and_a_verdict(trained: Trained) -> None:
    _, done = trained
    for forecaster in ("mamba", "random walk", "drift", "ewma walk", "ewma", "momentum", "ridge"):
        rows = re.findall(rf"^ \d+d +{forecaster}  .*$", done.stdout, re.MULTILINE)
        assert len(rows) == 2 * 4
    assert len(re.findall(r"^Verdict: the model .*baselines.*$", done.stdout, re.MULTILINE)) == 1
    assert re.search(r"^AAPL: (no skill|lower squared error).* stored as .*AAPL/v1$", done.stdout, re.MULTILINE)
    assert "Time: " in done.stdout.splitlines()[-1]


def test_the_printed_scores_are_the_stored_ones(trained: Trained) -> None:
    models, done = trained
    metrics = json.loads((models / "AAPL" / "v1" / "metrics.json").read_text())
    score = next(each for each in metrics["test"]["scores"] if each["forecaster"] == "ridge" and each["horizon"] == 5)
    row = re.search(r"^ 5d +ridge +(\S+) +(\S+) +(\S+)", done.stdout, re.MULTILINE)
    assert row is not None
    assert row.groups() == (f"{score['r2_random_walk']:.4f}", f"{score['r2_drift']:.4f}", f"{score['mase']:.3f}")


def test_predicting_prints_a_dict_of_prices_first_and_then_intervals(trained: Trained) -> None:
    done = mambakit("forecast", "predict", "AAPL", "--models", trained[0])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    prices = ast.literal_eval(done.stdout.splitlines()[0])
    assert list(prices) == ["1d", "5d", "10d", "30d"]
    for horizon, price in prices.items():
        row = re.search(rf"^ {horizon} +(\S+) +(\S+) \.\. (\S+) +(\S+) \.\. (\S+)", done.stdout, re.MULTILINE)
        assert row is not None
        shown, low_80, high_80, low_95, high_95 = map(float, row.groups())
        assert shown == pytest.approx(price, abs=0.005)
        assert low_95 < low_80 < price < high_80 < high_95
    assert "AAPL v1, as of 2013-03-01, current price 56.14" in done.stdout
    assert "AAPL: no skill" in done.stdout or "AAPL: lower squared error" in done.stdout


def test_predicting_as_json_gives_what_the_predictor_gives(trained: Trained) -> None:
    done = mambakit("forecast", "predict", "googl", "--models", trained[0], "--json")
    forecast = MambaPredictor(["GOOGL"], models=trained[0]).forecast(fetch_historical_prices(["GOOGL"])["GOOGL"])
    whole = json.loads(done.stdout)
    assert (whole["symbol"], whole["version"], whole["as_of"]) == ("GOOGL", "v1", "2013-03-01")
    assert whole["prices"] == pytest.approx(forecast.prices(), rel=1e-5)
    assert list(whole["intervals"]) == ["50%", "80%", "95%"]
    for horizon, bounds in forecast.intervals(0.95).items():
        assert whole["intervals"]["95%"][horizon] == pytest.approx(bounds, rel=1e-5)


def test_predicting_draws_the_fan_where_it_is_asked_to(trained: Trained, tmp_path: Path) -> None:
    done = mambakit(
        "forecast", "predict", "AAPL", "--models", trained[0], "--use", "v1", "--figure", tmp_path / "f.png"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f.png").stat().st_size > 20_000


def test_predicting_loads_nothing_that_only_training_needs(trained: Trained) -> None:
    heavy = ("accelerate", "pandas", "sklearn", "scipy", "statsmodels", "matplotlib")
    code = (
        "import sys\n"
        f"sys.argv = ['mambakit', 'forecast', 'predict', 'AAPL', '--models', {str(trained[0])!r}]\n"
        "from mambakit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_second_training_is_the_next_version(trained: Trained, tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        done = mambakit("forecast", "train", "--symbols", "IBM", *SMALL, "--out", tmp_path, "--quiet")
        assert f"IBM/{version}" in done.stdout
        assert "epoch" not in done.stdout
    assert json.loads((tmp_path / "IBM" / "aliases.json").read_text())["production"] == "v2"
    first, second = ((tmp_path / "IBM" / version / "model.safetensors").read_bytes() for version in ("v1", "v2"))
    assert first == second  # one seed, one result


def test_two_trainings_at_once_store_two_versions(tmp_path: Path) -> None:
    arguments = ("forecast", "train", "--symbols", "IBM", *SMALL, "--out", tmp_path, "--quiet")
    with ThreadPoolExecutor() as both:
        for done in both.map(lambda _: mambakit(*arguments), range(2)):
            assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "IBM").iterdir()} == {"v1", "v2", "aliases.json"}
    for version in ("v1", "v2"):
        verify_folder(tmp_path / "IBM" / version)


def test_a_killed_training_leaves_no_version_and_resumes_to_the_same_result(tmp_path: Path) -> None:
    settings = ["--days", "430", "--epochs", "12", "--patience", "12", "--d-model", "4", "--layers", "1", "--quiet"]
    train = ["forecast", "train", "--symbols", "IBM", *settings, "--out"]
    process = subprocess.Popen(command(*train, tmp_path / "killed"), env=environment(), stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "IBM" / ".run" / "1" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "000003").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name for path in (tmp_path / "killed" / "IBM").iterdir()} == {".run"}

    resumed = mambakit(*train, tmp_path / "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert {path.name for path in (tmp_path / "killed" / "IBM").iterdir()} == {"v1", "aliases.json"}
    assert mambakit(*train, tmp_path / "whole").returncode == 0
    for name in ("model.safetensors", "scaler.json", "config.json"):
        killed, whole = (tmp_path / run / "IBM" / "v1" / name for run in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes(), name


def test_resuming_takes_over_what_was_already_stored(trained: Trained) -> None:
    models, first = trained
    again = mambakit("forecast", "train", "--symbols", "AAPL,GOOGL", *SMALL, "--out", models, "--resume")
    assert again.returncode == 0, again.stderr
    assert "already trained, kept as" in again.stdout
    assert not (models / "AAPL" / "v2").exists()
    verdicts = [re.search("^Verdict.*$", done.stdout, re.MULTILINE).group() for done in (first, again)]
    assert verdicts[0] == verdicts[1]


def test_one_unknown_symbol_in_a_list_costs_nothing(tmp_path: Path) -> None:
    done = mambakit("forecast", "train", "--symbols", "AAPL,ZZZZ", *SMALL, "--out", tmp_path / "models")
    assert_one_line_error(done, "ZZZZ", "AAPL, GOOG, GOOGL, IBM, MSFT")
    assert not (tmp_path / "models").exists()


def test_a_path_is_no_symbol(tmp_path: Path) -> None:
    done = mambakit("forecast", "predict", "../../AAPL", "--models", tmp_path)
    assert_one_line_error(done, "'../../AAPL' is not a symbol")


def test_too_few_days_are_counted(tmp_path: Path) -> None:
    done = mambakit("forecast", "train", "--symbols", "AAPL", "--days", "100", "--out", tmp_path / "models")
    assert_one_line_error(done, "AAPL: 100 days of prices are too few, at least 400")
    assert not (tmp_path / "models").exists()


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = mambakit("forecast", "train", "--symbols", "AAPL", *SMALL, "--out", tmp_path / "file" / "models")
    assert_one_line_error(done, "cannot write models to", "--out")
    assert "epoch" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_predicting_without_a_model_says_how_to_train_one(tmp_path: Path) -> None:
    done = mambakit("forecast", "predict", "MSFT", "--models", tmp_path, "--no-fallback")
    assert_one_line_error(done, "no model of MSFT", "mambakit forecast train --symbols MSFT")


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing"])
def test_a_corrupted_model_file_is_named(trained: Trained, tmp_path: Path, damage: str) -> None:
    stored = trained[0] / "AAPL" / "v1"
    copy = tmp_path / "AAPL" / "v1"
    copy.mkdir(parents=True)
    for path in stored.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "changed":
        content[-1] ^= 1  # a single bit
        weights.write_bytes(content)
    elif damage == "cut short":
        weights.write_bytes(content[:-100])
    else:
        weights.unlink()
    done = mambakit("forecast", "predict", "AAPL", "--models", tmp_path, "--no-fallback")
    assert_one_line_error(done, "model.safetensors")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "either --test or --symbols"),
        (["train", "--test", "--symbols", "AAPL"], "either --test or --symbols"),
        (["train", "--symbols", " , "], "names no symbol"),
        (["train", "--test", "--epochs", "0"], "--epochs"),
        (["train", "--test", "--learning-rate", "0"], "--learning-rate"),
        (["train", "--test", "--epoch", "3"], "--epoch"),
        (["train", "--test", "--preset", "huge"], "--preset"),
        (["train", "--test", "--mixer", "lstm"], "--mixer"),
        (["train", "--test", "--mixer", "mamba3", "--d-model", "0"], "--d-model"),
        (["train", "--test", "--mode", "chunks"], "--mode"),
        (["train", "--test", "--precision", "int8"], "--precision"),
        (["train", "--test", "--schedule", "linear"], "--schedule"),
        (["train", "--test", "--accumulate", "0"], "--accumulate"),
        (["train", "--test", "--clip-norm", "-1"], "--clip-norm"),
        (["train", "--test", "--tracker-dir", "x"], "--tracker"),
        (["predict"], "SYMBOL"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["forecast", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_usage_error_of_the_command_shows_no_traceback() -> None:
    done = mambakit("forecast", "train")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_every_option_of_a_training_reaches_the_stored_model(tmp_path: Path) -> None:
    options = {
        "--preset": "small",
        "--mixer": "mamba2",
        "--mode": "windows",
        "--d-model": "8",
        "--layers": "1",
        "--epochs": "1",
        "--batch-size": "24",
        "--learning-rate": "0.003",
        "--schedule": "plateau",
        "--patience": "3",
        "--accumulate": "2",
        "--clip-norm": "0",
        "--precision": "bf16",
        "--seed": "7",
        "--days": "430",
        "--tracker": "tensorboard",
    }
    done = mambakit(
        "forecast",
        "train",
        "--symbols",
        "IBM",
        "--out",
        tmp_path,
        "-q",
        *(part for pair in options.items() for part in pair),
    )
    assert done.returncode == 0, done.stderr
    metadata = json.loads((tmp_path / "IBM" / "v1" / "metadata.json").read_text())
    model, training = metadata["model_config"], metadata["training_config"]
    assert (model["mixer"], model["training_mode"], model["d_model"], model["num_layers"]) == (
        "mamba2",
        "windows",
        8,
        1,
    )
    assert model["d_state"] == 8  # of the preset
    assert training == {
        "restart_epochs": None,
        "average_decay": None,
        "epochs": 1,
        "batch_size": 24,
        "learning_rate": 0.003,
        "weight_decay": 0.1,
        "clip_norm": None,
        "schedule": "plateau",
        "warmup_fraction": 0.05,
        "min_learning_rate_ratio": 0.01,
        "patience": 3,
        "min_delta": 0.0,
        "seed": 7,
        "mixed_precision": "bf16",
        "gradient_accumulation": 2,
    }
    assert list((tmp_path / "tracker_runs" / "IBM").glob("events*"))


def test_a_preset_brings_its_settings(tmp_path: Path) -> None:
    done = mambakit(
        "forecast", "train", "--symbols", "IBM", "--preset", "small", "--mode", "windows", "--days", "430",
        "--epochs", "1", "--d-model", "4", "--out", tmp_path, "-q",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metadata = json.loads((tmp_path / "IBM" / "v1" / "metadata.json").read_text())
    assert metadata["training_config"]["batch_size"] == 16
    assert metadata["training_config"]["learning_rate"] == pytest.approx(4e-4)


def test_a_pooled_model_is_trained_and_predicts_a_symbol_that_it_has_not_met(tmp_path: Path) -> None:
    done = mambakit("forecast", "train", "--pooled", "--symbols", "AAPL,IBM", *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "One model of 2 symbols, stored as" in done.stdout
    assert re.search(r"^Time: imports and data .* training .* judging .*", done.stdout, re.MULTILINE)
    met = mambakit("forecast", "predict", "AAPL", "--pooled", "--models", tmp_path)
    assert met.returncode == 0, met.stderr
    assert "AAPL: no skill" in met.stdout or "AAPL: lower squared error" in met.stdout
    other = mambakit("forecast", "predict", "MSFT", "--pooled", "--models", tmp_path)
    assert other.returncode == 0, other.stderr
    assert list(ast.literal_eval(other.stdout.splitlines()[0])) == ["1d", "5d", "10d", "30d"]
    assert "MSFT: not met in training" in other.stdout
    missing = mambakit("forecast", "predict", "MSFT", "--pooled", "--models", tmp_path / "none")
    assert "fallback: no pooled model in" in missing.stdout
    assert "mambakit forecast train --pooled" in missing.stdout


def test_a_tracker_that_is_not_installed_is_named_before_any_work(tmp_path: Path) -> None:
    done = mambakit(
        "forecast", "train", "--symbols", "AAPL", *SMALL, "--tracker", "comet", "--out", tmp_path / "models"
    )
    assert_one_line_error(done, "tracker must be tensorboard, mlflow or wandb")
    assert not (tmp_path / "models").exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.slow
def test_two_processes_train_one_version_as_one_process_does(tmp_path: Path) -> None:
    train = ["forecast", "train", "--symbols", "IBM", *SMALL, "--batch-size", "2", "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    with ThreadPoolExecutor() as both:
        done = list(both.map(lambda rank: mambakit(*train, tmp_path / "two", **rank), ranks))
    assert [process.returncode for process in done] == [0, 0], done
    assert "Verdict" in done[0].stdout
    assert done[1].stdout == ""
    assert {path.name for path in (tmp_path / "two" / "IBM").iterdir()} == {"v1", "aliases.json"}
    assert mambakit(*train, tmp_path / "one", "-q").returncode == 0
    two, one = (load_file(tmp_path / run / "IBM" / "v1" / "model.safetensors") for run in ("two", "one"))
    # Dropout differs between the processes; the start, fitted to the same training part, does not.
    for name in ("drift", "blend"):
        assert torch.equal(two[name], one[name]), name
    assert verify_folder(tmp_path / "two" / "IBM" / "v1") is None
