"""A submission runs where nothing is installed, predicts as the library does, and is packed to the same bytes."""

import io
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from tests.stream.networks import EVERYTHING, KINDS, random_ensemble

from mambakit.errors import ArtefactError
from mambakit.stream import PredictionModel, Scorer
from mambakit.stream import pack as module
from mambakit.stream.pack import pack, submission
from mambakit.stream.plain import mixers
from mambakit.stream.plain.submission import SubmittedModel

STAND_IN = Path(__file__).parent / "contest_stand_in"
# What the contest's scorer needs; NumPy is all that the submission uses.
SCORER_NEEDS = ("numpy", "pandas", "pyarrow", "scikit-learn")


def with_what_they_need(names):
    """Names of distributions, and of all that these require, here and now."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def top_level(name):
    """The folders and modules that a distribution put into site-packages."""
    return {file.parts[0] for file in metadata.files(name) or () if file.parts[0] != ".."}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of a fresh virtual environment that holds only what the contest's has."""
    root = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(root, with_pip=False, symlinks=os.name != "nt")
    ours = Path(sysconfig.get_paths()["purelib"])
    theirs = Path(sysconfig.get_path("purelib", vars={"base": str(root)}))
    for entry in set().union(*map(top_level, with_what_they_need(SCORER_NEEDS))) - {"__pycache__"}:
        (theirs / entry).symlink_to(ours / entry)
    return root / "bin" / "python"


def unpacked(ensemble, folder):
    with zipfile.ZipFile(io.BytesIO(submission(ensemble))) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="links between environments need privileges there")
@pytest.mark.parametrize("settings", [{"kind": "mamba"}, {"kind": "mamba2", **EVERYTHING}], ids=["mamba", "everything"])
def test_the_submission_runs_in_an_empty_environment_and_scores_as_the_library(
    bare_python, table, sequences, tmp_path, settings
):
    ensemble = random_ensemble(sequences, num_models=3, **settings)
    folder = unpacked(ensemble, tmp_path / "submission")
    (folder / "utils.py").write_bytes((STAND_IN / "utils.py").read_bytes())
    table.to_parquet(tmp_path / "data.parquet")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [bare_python, "-I", "-B", STAND_IN / "run.py", folder, tmp_path / "data.parquet", tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["found"] == [], "the environment is not empty"
    scorer = Scorer(table)
    _, expected = scorer.collect(PredictionModel(ensemble))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5 * np.abs(expected).max())
    assert found["score"] == pytest.approx(scorer.score(PredictionModel(ensemble))["mean_r2"], abs=1e-5)


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["raw", "everything"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_in_numpy_is_the_librarys(table, sequences, tmp_path, kind, settings):
    ensemble = random_ensemble(sequences, kind=kind, **settings)
    _, plain = Scorer(table).collect(SubmittedModel(unpacked(ensemble, tmp_path)))
    _, ours = Scorer(table).collect(PredictionModel(ensemble))
    assert plain.dtype == np.float64
    np.testing.assert_allclose(plain, ours, atol=1e-5 * max(1.0, np.abs(ours).max()))


def test_predictions_are_float32_and_bad_rows_are_refused(sequences, tmp_path):
    from mambakit.stream.contest import DataPoint

    model = SubmittedModel(unpacked(random_ensemble(sequences), tmp_path))
    assert model.predict(DataPoint(0, 0, True, np.zeros(8))).dtype == np.float32
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict(DataPoint(0, 1, True, np.full(8, np.nan)))
    with pytest.raises(ValueError, match="step 3 came where step 1"):
        model.predict(DataPoint(0, 3, True, np.zeros(8)))


def test_the_same_weights_give_the_same_bytes_and_others_other_bytes(sequences, tmp_path):
    ensemble = random_ensemble(sequences)
    for name in ("one.zip", "two.zip"):
        pack(ensemble, tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with torch.no_grad():
        ensemble.models[1].embed.bias[0] += 1e-3
    assert submission(ensemble) != (tmp_path / "one.zip").read_bytes()


def test_solution_stands_at_the_root_and_imports_numpy_alone(sequences, tmp_path):
    folder = unpacked(random_ensemble(sequences), tmp_path)
    assert {path.name for path in folder.iterdir()} == {"solution.py", "stepper", "weights.json", "weights.bin"}
    allowed = {"numpy", "json", "pathlib", "typing", "collections.abc", "stepper.submission"}
    for path in folder.rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert line.split()[1] in allowed or line.startswith("from ."), f"{path.name}: {line}"


def test_a_submission_that_the_contest_would_not_take_is_not_written(sequences, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_ZIP", 10_000)
    with pytest.raises(ArtefactError, match=r"would be 0\.\d MB.*train fewer models"):
        pack(random_ensemble(sequences), tmp_path / "submission.zip")
    assert not (tmp_path / "submission.zip").exists()


def test_the_default_ensemble_fits_in_the_contests_limit(sequences):
    ensemble = random_ensemble(sequences, num_models=3, d_model=128, n_layers=4)
    assert len(submission(ensemble)) < module.LARGEST_ZIP / 3


def test_gelu_without_an_error_function_is_torchs():
    x = torch.linspace(-8, 8, 2001)
    np.testing.assert_allclose(mixers.gelu(x.numpy()), torch.nn.functional.gelu(x), atol=1e-6)


def test_gates_that_are_shut_are_zero_and_not_nan():
    with np.errstate(over="ignore"):
        for function in (mixers.silu, mixers.sigmoid):
            assert function(np.float32([-200.0])).tolist() == [0.0]
    assert mixers.softplus(np.float32([-200.0, 200.0])).tolist() == [0.0, 200.0]
