"""The streaming benchmarks at sizes of seconds: they run, and say what passed."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks.stream import Trained, _verdicts
from tests.warm_processes import run_module

from benchmarks import stream_latency, stream_proxy
from mambakit.stream import PredictionModel

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    return run_module(module, *map(str, arguments), cwd=ROOT, environment={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_kind_is_trained_and_every_promise_judged(tmp_path):
    sizes = ["--sequences", 6, "--steps", 110, "--epochs", 1, "--d-model", 16, "--n-layers", 1, "--seeds", 2]
    done = run("benchmarks.stream", *sizes, "--kinds", "mamba,gru,ridge", "--quiet", "--json", tmp_path / "record.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["scores"].keys() == {"repeat", "ridge", "mamba", "gru"}
    assert [(one["kind"], one["number"]) for one in record["networks"]] == [
        *(("mamba", 0), ("mamba", 1), ("gru", 0), ("gru", 1)),
    ]
    assert record["scores"]["mamba"] < record["attainable"]
    judged = [verdict["what"] for verdict in record["verdicts"]]
    assert len(judged) == 5
    assert all(f"  {what}"[:60] in done.stdout for what in judged)


@pytest.mark.parametrize(("ridge", "gru", "passed"), [(0.30, 0.38, True), (0.37, 0.38, False), (0.30, 0.45, False)])
def test_a_promise_that_is_not_kept_fails(ridge, gru, passed):
    options = type("Options", (), {"device": "cpu", "seeds": 1})
    network = Trained("mamba", 0, 1, 60.0, 1, 1, 0.4, 0.4, "")
    verdicts = _verdicts(options, [network], {"ridge": ridge, "gru": gru, "mamba": 0.4}, attainable=0.41)
    assert all(good for good, _ in verdicts) == passed


def test_a_network_that_diverged_is_named():
    options = type("Options", (), {"device": "cpu", "seeds": 1})
    verdicts = _verdicts(options, [Trained("mamba2", 0, 0, 1.0, 0, 0, 0.0, 0.0, "NaN in step 3")], {"ridge": 0.3}, None)
    assert verdicts == [(False, "all 1 networks trained without NaN; NaN in step 3")]


def test_ticks_are_timed_for_every_percentile():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ensemble = stream_latency.make_ensemble("mamba", "engineered", models=2, d_model=16, n_layers=1)
        times = stream_latency.time_ticks(PredictionModel(ensemble), 1100)
        assert 0 < times["p50"] <= times["p99"] <= times["p99.9"]
        assert stream_latency.floor(10_000, torch.float32, cold=False) > 0
    finally:
        torch.set_num_threads(before)


def test_the_proxys_numbers_of_a_tick_are_their_definitions():
    times = pd.to_datetime(["2013-09-01 17:00:00.0", "2013-09-01 17:00:00.5", "2013-09-01 17:00:00.5"])
    ticks = pd.DataFrame({"DateTime": times, "Price": [1600.0, 1600.25, 1600.25], "Volume": [1, 2, 3]})
    expected = [
        [0.0, np.log(2), 0.0, 0.0],
        [1e4 * np.log(1600.25 / 1600), np.log(3), np.log(3), np.log(501)],
        [0.0, np.log(4), np.log(4), 0.0],
    ]
    np.testing.assert_allclose(stream_proxy.tick_features(ticks), expected, atol=1e-9)
