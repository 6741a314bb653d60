"""A stored ensemble predicts as the one that was trained, and a damaged one is refused."""

import json

import numpy as np
import pytest

from mambakit.errors import ArtefactError, DataError
from mambakit.stream.artefact import load_ensemble, save_ensemble
from mambakit.stream.config import STREAM_TRAINING, StreamConfig
from mambakit.stream.data import Layout
from mambakit.stream.train import train_ensemble


@pytest.fixture(scope="module")
def trained(sequences):
    config = StreamConfig(d_model=16, n_layers=1, residual=True)
    return train_ensemble(sequences, config, STREAM_TRAINING.model_copy(update={"epochs": 1}), 2, quiet=True)


@pytest.fixture
def folder(trained, tmp_path):
    save_ensemble(tmp_path / "model", trained, "train.parquet")
    return tmp_path / "model"


def test_what_was_stored_predicts_the_same(trained, folder, sequences):
    loaded = load_ensemble(folder)
    np.testing.assert_array_equal(loaded.ensemble.predict(sequences.states), trained.ensemble.predict(sequences.states))
    assert loaded.ensemble.config == trained.ensemble.config
    assert loaded.metrics["validation"] == trained.scores


def test_the_folder_holds_plain_files_alone(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.json",
        "config.json",
        "metadata.json",
        "metrics.json",
        "model-0.safetensors",
        "model-1.safetensors",
        "ridge.safetensors",
    ]
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["sequences"] == {"training": 5, "validation": 1}
    assert metadata["data"] == "train.parquet"


def test_it_is_not_written_over_another(trained, folder):
    with pytest.raises(FileExistsError):
        save_ensemble(folder, trained, "train.parquet")


@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json", "ridge.safetensors"])
def test_a_changed_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=f"{name} is not what was written"):
        load_ensemble(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="nothing is not there"):
        load_ensemble(tmp_path / "nothing")


def test_a_table_with_other_columns_does_not_fit(trained):
    other = Layout(("a", "b"), ("a", "b"), same_row=False)
    with pytest.raises(DataError, match=r"trained on 8 features \(0 \.\. 7\) and the file has 2 \(a, b\)"):
        trained.ensemble.require_fit(other)
