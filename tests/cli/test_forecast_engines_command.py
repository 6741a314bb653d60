"""Many symbols at the command line: side by side, with failures among them, with settings from a search, killed."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.cli.command_line import SMALL, assert_one_line_error, command, environment, mambakit

from mambakit.forecast import fetch_historical_prices


def prices(folder: Path, *symbols: str, days: int = 500) -> Path:
    """A folder of files with the last days of built-in series, under other names."""
    folder.mkdir(exist_ok=True)
    for symbol, own in zip(symbols, ("AAPL", "IBM", "MSFT", "GOOG"), strict=False):
        series = fetch_historical_prices([own])[own].last(days)
        rows = [f"{day},{price}" for day, price in zip(series.dates, series.prices, strict=True)]
        (folder / f"{symbol}.csv").write_text("\n".join(["Date,Adj Close", *rows]) + "\n")
    return folder


def test_a_symbol_that_cannot_be_used_is_named_in_the_end_and_stops_no_other(tmp_path: Path) -> None:
    source = prices(tmp_path / "prices", "AA", "BB")
    (source / "CC.csv").write_text("Date,Close\n2020-01-02,1.5\n2020-01-03,1.6\n")
    done = mambakit("forecast", "train", "--symbols", "AA,CC,BB", "--source", source, *SMALL, "--out", tmp_path / "m")
    assert done.returncode == 1
    assert done.stderr == "mambakit: error: 1 of 3 symbols failed: CC\n"
    table = done.stdout[done.stdout.index("What became of each symbol") :]
    first_cells = [line.split()[1] for line in table.splitlines() if line.startswith("│")]
    assert [cell for cell in first_cells if cell != "│"] == ["AA", "BB", "CC"]
    assert "2 days of prices are too few" in " ".join(table.split())
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["AA", "BB"]


@pytest.mark.slow
def test_the_models_do_not_depend_on_how_many_are_trained_at_once(tmp_path: Path) -> None:
    source = prices(tmp_path / "prices", "AA", "BB")
    weights = {}
    for parallel in (1, 2):
        out = tmp_path / str(parallel)
        done = mambakit(
            "forecast",
            "train",
            "--symbols",
            "AA,BB",
            "--source",
            source,
            *SMALL,
            "--parallel",
            parallel,
            "--out",
            out,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        weights[parallel] = {name: load_file(out / name / "v1" / "model.safetensors") for name in ("AA", "BB")}
    for name, first in weights[1].items():
        for key, value in first.items():
            np.testing.assert_array_equal(value.numpy(), weights[2][name][key].numpy(), err_msg=f"{name} {key}")


@pytest.mark.slow
def test_killing_the_command_ends_its_processes_and_resuming_finishes_every_symbol(tmp_path: Path) -> None:
    source = prices(tmp_path / "prices", "AA", "BB")
    arguments = [
        *("forecast", "train", "--symbols", "AA,BB", "--source", source, "--out", tmp_path / "m"),
        *("--d-model", "8", "--layers", "1", "--epochs", "120", "--patience", "120", "--parallel", "2"),
    ]
    running = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    checkpoints = tmp_path / "m"
    deadline = time.monotonic() + 60
    while len(list(checkpoints.glob("*/.run/1/checkpoints/[0-9]*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert not list(checkpoints.glob("*/v1"))
    done = mambakit(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(list(checkpoints.glob("*/v1"))) == 2


def test_settings_that_a_search_found_are_trained_with(tmp_path: Path) -> None:
    source = prices(tmp_path / "prices", "AA")
    best = tmp_path / "best.json"
    found = mambakit(
        *("forecast", "tune", "--symbols", "AA", "--source", source, "--trials", "2", "--epochs", "1", "--out", best),
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert found.stdout.splitlines()[0].startswith("trial 0: validation ")
    done = mambakit(
        "forecast",
        "train",
        "--symbols",
        "AA",
        "--source",
        source,
        "--settings",
        best,
        "--out",
        tmp_path / "m",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(best.read_text())
    metadata = json.loads((tmp_path / "m" / "AA" / "v1" / "metadata.json").read_text())
    assert metadata["model_config"] == settings["model"]
    assert metadata["training_config"] == settings["training"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ray-address", "auto"], "needs --engine ray"),
        (["--engine", "ray", "--parallel", "2"], "the cluster decides"),
        (["--engine", "cloud"], "expected local or ray"),
        (["--pooled", "--parallel", "2"], "a pooled model is a single training"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = mambakit("forecast", "train", "--symbols", "AAPL", *arguments, "--out", tmp_path / "m")
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "m").exists()


def test_a_cluster_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = mambakit(
        *("forecast", "train", "--symbols", "AAPL", *SMALL, "--engine", "ray", "--ray-address", "127.0.0.1:1"),
        *("--out", tmp_path / "m"),
    )
    assert_one_line_error(done, "no Ray cluster at '127.0.0.1:1': start one with `ray start --head`")
    assert list(tmp_path.iterdir()) == []
