"""The stream commands as a contestant types them, from a generated file to a submission."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from tests.cli.command_line import assert_one_line_error, command, environment, mambakit
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.errors import ArtefactError, DataError
from mambakit.stream import Scorer
from mambakit.stream.plain.submission import SubmittedModel

SMALL = ["--num-models", "2", "--epochs", "2", "--d-model", "16", "--n-layers", "1", "--quiet"]


def here(*arguments: object) -> Result:
    """Run a stream command in this process: much sooner, and an error stays an exception."""
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, ["stream", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)  # which scoring sets to one


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet, valid.parquet, and what training on the one printed."""
    folder = tmp_path_factory.mktemp("stream")
    for seed, name in enumerate(("train.parquet", "valid.parquet")):
        done = mambakit(
            *("stream", "generate", "--out", name, "--sequences", 6, "--steps", 120, "--features", 8, "--seed", seed),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.txt").write_text(done.stdout)
    done = mambakit("stream", "train", "--data", "train.parquet", *SMALL, cwd=folder, fresh=True)
    assert done.returncode == 0, done.stderr
    (folder / "train.txt").write_text(done.stdout)
    return folder


def test_generate_prints_the_attainable_score_and_says_synthetic(made: Path) -> None:
    printed = (made / "train.parquet.txt").read_text()
    assert "6 synthetic sequences of 120 steps, 8 features, seed 0" in printed
    assert "attainable mean R2 0." in printed
    table = pd.read_parquet(made / "train.parquet")
    assert list(table.columns) == ["seq_ix", "step_in_seq", "need_prediction", *map(str, range(8))]


def test_train_prints_the_ensemble_beside_the_baselines(made: Path) -> None:
    printed = (made / "train.txt").read_text()
    for words in ("2 x mamba", "trained on 5 sequences", "Validation, 1 other", "ensemble", "ridge", "repeat"):
        assert words in printed
    assert "stored as stream-model" in printed
    assert not (made / "stream-model.run").exists(), "checkpoints go when the models are stored"


def test_score_prints_the_contests_metric_and_the_time_of_a_tick(made: Path) -> None:
    done = mambakit("stream", "score", "--data", "valid.parquet", cwd=made)
    assert done.returncode == 0, done.stderr
    for words in ("mean R2", "114 predictions", "of the attainable", "p99.9", "all 720 ticks"):
        assert words in done.stdout
    exact, half = (_scores(made, *extra) for extra in ((), ("--precision", "bfloat16")))
    assert f"mean R2 {exact['mean_r2']:.4f}" in done.stdout
    assert len(exact) == 9
    assert 0 < abs(exact["mean_r2"] - half["mean_r2"]) < 1e-2


def _scores(made: Path, *options: str) -> dict[str, float]:
    arguments = ["--data", made / "valid.parquet", "--model", made / "stream-model", "--json", *options]
    done = here("score", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["scores"]


def test_pack_writes_the_same_submission_twice(made: Path) -> None:
    done = mambakit("stream", "pack", "--out", "one.zip", cwd=made)
    assert done.returncode == 0, done.stderr
    assert "MB of 20, SHA-256" in done.stdout
    assert here("pack", "--model", made / "stream-model", "--out", made / "two.zip").exit_code == 0
    assert (made / "one.zip").read_bytes() == (made / "two.zip").read_bytes()
    with zipfile.ZipFile(made / "one.zip") as archive:
        assert "solution.py" in archive.namelist()


def test_report_writes_a_folder(made: Path) -> None:
    done = mambakit("stream", "report", "--data", "valid.parquet", "--out", "report", cwd=made)
    assert done.returncode == 0, done.stderr
    assert (made / "report" / "report.md").is_file()
    assert "attainable" in done.stdout
    again = here("report", "--data", made / "valid.parquet", "--out", made / "report")
    assert isinstance(again.exception, ArtefactError)
    assert "report is there already" in str(again.exception)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_training_resumes_to_the_same_models(made: Path) -> None:
    options = ["--data", "train.parquet", *SMALL[:2], "--epochs", "6", *SMALL[4:]]
    whole = mambakit("stream", "train", *options, "--out", "whole", cwd=made)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(command("stream", "train", *options, "--out", "cut"), cwd=made, env=environment())
    deadline = time.monotonic() + 60
    while not list((made / "cut.run").glob("model-*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (made / "cut").exists(), "killed too late to show anything"
    resumed = mambakit("stream", "train", *options, "--out", "cut", "--resume", cwd=made)
    assert resumed.returncode == 0, resumed.stderr
    for number in range(2):
        name = f"model-{number}.safetensors"
        assert (made / "cut" / name).read_bytes() == (made / "whole" / name).read_bytes()
    again = mambakit("stream", "train", *options, "--out", "cut", "--resume", cwd=made)
    assert "already trained, kept as cut" in again.stdout


def test_models_are_not_trained_over_others(made: Path) -> None:
    done = mambakit("stream", "train", "--data", "train.parquet", *SMALL, cwd=made)
    assert_one_line_error(done, "stream-model is there already", "--out")
    options = ["--data", made / "train.parquet", *SMALL, "--out", made / "stream-model", "--seed", "1", "--resume"]
    other = here("train", *options)
    assert isinstance(other.exception, ArtefactError), "the settings are others"


def test_generated_files_are_not_written_over_others(made: Path) -> None:
    done = here("generate", "--out", made / "train.parquet")
    assert isinstance(done.exception, DataError)
    assert "train.parquet is there already" in str(done.exception)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.assign(**{"3": np.where(table.index == 200, np.nan, table["3"])}), ["'3'", "row 200"]),
        (lambda table: table.drop(index=50), ["step 51", "step 50 is expected"]),
        (lambda table: table.iloc[:110], ["ends at step 109", "need_prediction"]),
        (lambda table: table.drop(columns=["7"]), ["trained on 8 features", "has 7"]),
        (lambda table: table.iloc[:0], ["no rows"]),
    ],
    ids=["NaN", "a row missing", "cut short", "too narrow", "empty"],
)
def test_a_bad_file_is_refused_and_never_scored(made: Path, tmp_path: Path, change, words: list[str]) -> None:
    change(pd.read_parquet(made / "valid.parquet")).to_parquet(tmp_path / "bad.parquet")
    done = here("score", "--data", tmp_path / "bad.parquet", "--model", made / "stream-model")
    assert isinstance(done.exception, DataError)
    for word in words:
        assert word in str(done.exception)
    assert "R2" not in done.stdout


def test_a_file_that_is_not_there_is_named(made: Path) -> None:
    done = mambakit("stream", "train", "--data", "none.parquet", "--out", "none", cwd=made)
    assert_one_line_error(done, "none.parquet is not there")
    assert "none.parquet is not there" in str(
        here("score", "--data", "none.parquet", "--model", made / "stream-model").exception
    )
    assert "none is not there" in str(here("pack", "--model", made / "none").exception)
    assert not (made / "none").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kind", "transformer"], ["--kind", "mamba2"]),
        (["--features", "all"], ["--features", "raw"]),
        (["--learning-rate", "-1"], ["--learning-rate", "greater than 0"]),
        (["--precision", "fp8"], ["--precision", "bf16"]),
        (["--kind", "gru", "--d-state", "4"], ["d_state is no setting of gru"]),
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(options: list[str], words: list[str]) -> None:
    done = CliRunner().invoke(app, ["stream", "train", "--data", "train.parquet", *options])
    assert done.exit_code == 2
    for word in words:
        assert word in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["generate", "train", "score", "pack", "report"]),
        (["train"], ["--num-models", "--context-length", "--batch-size", "--d-model", "--n-layers", "--resume"]),
        (["score"], ["--precision", "--json"]),
    ],
)
def test_help_names_commands_and_options(arguments: list[str], words: list[str]) -> None:
    done = CliRunner().invoke(app, ["stream", *arguments, "--help"])
    assert done.exit_code == 0
    for word in words:
        assert word in done.output


def test_restarts_no_average_and_a_context_are_passed_on(made: Path) -> None:
    options = ["--restart-epochs", "1", "--average-decay", "0", "--context-length", "40", "--normalise", "--residual"]
    done = here("train", "--data", made / "train.parquet", *SMALL, *options, "--out", made / "other")
    assert done.exit_code == 0, done.output
    config = json.loads((made / "other" / "config.json").read_text())
    training = json.loads((made / "other" / "metadata.json").read_text())["training_config"]
    assert (config["context_length"], config["normalise"], config["residual"]) == (40, True, True)
    assert (training["schedule"], training["restart_epochs"]) == ("restarts", 1)
    assert training["average_decay"] is None


def test_the_second_edition_goes_from_its_file_to_its_submission(made: Path, tmp_path: Path) -> None:
    """Targets are columns of the row itself, the metric is the weighted correlation, a prediction has two numbers."""
    table = pd.read_parquet(made / "train.parquet").rename(columns=lambda name: f"p{name}" if name.isdigit() else name)
    table["t0"], table["t1"] = table["p0"] + table["p1"], -table["p2"]
    table["need_prediction"] = table["step_in_seq"] >= 99
    data, model = tmp_path / "edition2.parquet", tmp_path / "model"
    table.to_parquet(data)
    options = ["--target", "t0,t1", "--metric", "pearson", "--learning-rate", "0.01", "--average-decay", "0"]
    done = here("train", "--data", data, "--out", model, *SMALL[:2], "--epochs", "8", *SMALL[4:], *options)
    assert done.exit_code == 0, done.output
    assert "mean weighted Pearson" in done.stdout
    assert "repeat" not in done.stdout, "a state of eight numbers predicts no target of two"
    scores = json.loads(here("score", "--data", data, "--model", model, "--json").stdout)["scores"]
    assert scores.keys() == {"mean_pearson", "t0", "t1"}
    assert scores["mean_pearson"] > 0.3
    assert here("report", "--data", data, "--model", model, "--out", tmp_path / "report").exit_code == 0
    assert "mean weighted Pearson" in (tmp_path / "report" / "report.md").read_text()
    assert here("pack", "--model", model, "--out", tmp_path / "submission.zip").exit_code == 0
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        archive.extractall(tmp_path / "submission")
    scorer = Scorer(data, ("t0", "t1"), "pearson")
    assert scorer.score(SubmittedModel(tmp_path / "submission")) == pytest.approx(scores, abs=1e-5)
