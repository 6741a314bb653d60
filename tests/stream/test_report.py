"""The report holds what it promises."""

import json

import numpy as np
import pytest

from mambakit.errors import DataError
from mambakit.stream.artefact import load_ensemble, save_ensemble
from mambakit.stream.config import STREAM_TRAINING, StreamConfig
from mambakit.stream.contest import target_scores
from mambakit.stream.generate import generate, reference_scores, write_generated
from mambakit.stream.report import write_report
from mambakit.stream.train import train_ensemble


@pytest.fixture(scope="module")
def reported(table, sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    config = StreamConfig(d_model=16, n_layers=1)
    trained = train_ensemble(sequences, config, STREAM_TRAINING.model_copy(update={"epochs": 2}), 2, quiet=True)
    save_ensemble(folder / "model", trained, "train.parquet")
    write_generated(folder / "data.parquet", table, reference_scores(table))
    saved = load_ensemble(folder / "model")
    write_report(saved, folder / "data.parquet", folder / "report")
    return folder, saved


def test_it_holds_tables_numbers_and_four_figures(reported):
    folder, _ = reported
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {
        *("report.md", "scores.json", "checksums.json"),
        *("targets.png", "steps.png", "learning.png", "latency.png"),
    }
    for name in ("targets.png", "steps.png", "learning.png", "latency.png"):
        content = (folder / "report" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000, "not an empty canvas"


def test_its_numbers_are_the_scores(reported, table, sequences):
    folder, saved = reported
    found = json.loads((folder / "report" / "scores.json").read_text())
    truth = sequences.targets[sequences.scored]
    whole = saved.ensemble.predict(sequences.states)[sequences.scored]
    expected = target_scores(truth, whole, sequences.layout.targets)
    assert found["forecasters"]["ensemble"] == pytest.approx(expected)
    assert found["streamed"] == pytest.approx(expected["mean_r2"], abs=1e-5)
    assert found["forecasters"]["attainable"]["mean_r2"] == pytest.approx(reference_scores(table)["attainable"])
    assert (found["rows"], found["scored"]) == (720, 114)
    assert found["latency_microseconds"].keys() == {"p50", "p99", "p99.9"}
    steps = found["steps"]
    assert len(steps["centres"]) == len(steps["ensemble"]) == 19
    first = target_scores(sequences.targets[:, 100], saved.ensemble.predict(sequences.states)[:, 100], ["x"] * 8)
    assert steps["ensemble"][0] == pytest.approx(first["mean_r2"])


def test_it_says_that_synthetic_data_is_synthetic(reported):
    folder, _ = reported
    text = (folder / "report" / "report.md").read_text()
    assert "This file is synthetic" in text
    assert "| attainable |" in text


def test_a_file_of_another_width_is_refused(reported, tmp_path):
    wide = generate(2, 110, 16)
    wide.to_parquet(tmp_path / "wide.parquet")
    with pytest.raises(DataError, match=r"trained on 8 features .* the file has 16"):
        write_report(reported[1], tmp_path / "wide.parquet", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_unremarkable_file_has_no_attainable_score(reported, table, tmp_path):
    table.to_parquet(tmp_path / "plain.parquet")
    found = write_report(reported[1], tmp_path / "plain.parquet", tmp_path / "report")
    assert found["forecasters"].keys() == {"ensemble", "ridge"}
    assert np.isfinite(found["streamed"])


def test_a_generated_file_that_was_changed_is_refused(reported, table, tmp_path):
    write_generated(tmp_path / "changed.parquet", table, {"attainable": 0.5})
    with pytest.raises(DataError, match=r"notes an attainable score of 0\.5000, and today's generator reaches 0\."):
        write_report(reported[1], tmp_path / "changed.parquet", tmp_path / "report")
