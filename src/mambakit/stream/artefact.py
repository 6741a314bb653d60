"""A trained ensemble as a folder of plain files, and back: JSON and safetensors, no pickle.

config.json  model-0.safetensors  model-1.safetensors ...  ridge.safetensors  metrics.json  metadata.json
checksums.json
"""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save

from mambakit.errors import ArtefactError
from mambakit.stream.config import StreamConfig
from mambakit.stream.data import Layout
from mambakit.stream.ensemble import Ensemble
from mambakit.stream.model import StreamModel
from mambakit.stream.ridge import Ridge
from mambakit.stream.train import TrainedEnsemble, parameters
from mambakit.training.artefacts import read_json, verify_folder, write_folder, write_json
from mambakit.training.checkpoint import load_weights


@dataclass(frozen=True)
class SavedEnsemble:
    """A stored ensemble, ready to predict."""

    ensemble: Ensemble
    metrics: dict[str, Any]  # "validation": scores; "training": one record a model
    metadata: dict[str, Any]


def save_ensemble(folder: str | Path, trained: TrainedEnsemble, data: str) -> None:
    """Write `folder`, whole or not at all; `data` says what it was trained on.

    Raises FileExistsError where the folder is there already, ArtefactError where it can't be written.
    """
    ensemble = trained.ensemble

    def fill(folder: Path) -> None:
        write_json(folder / "config.json", ensemble.config.model_dump(mode="json"))
        for number, model in enumerate(ensemble.models):
            (folder / f"model-{number}.safetensors").write_bytes(save(model.state_dict()))
        (folder / "ridge.safetensors").write_bytes(save_arrays(ensemble.ridge.tensors()))
        records = [record.model_dump(mode="json") for record in trained.records]
        write_json(folder / "metrics.json", {"validation": trained.scores, "training": records})
        write_json(folder / "metadata.json", describe(trained, data))

    write_folder(folder, fill)


def load_ensemble(folder: str | Path) -> SavedEnsemble:
    """Read and check a folder that `save_ensemble` wrote.

    Raises ArtefactError where it is missing, damaged, or not what this version of mambakit writes.
    """
    folder = Path(folder)
    verify_folder(folder)
    try:
        config = StreamConfig.model_validate(read_json(folder / "config.json"))
        metadata, metrics = read_json(folder / "metadata.json"), read_json(folder / "metrics.json")
        layout = Layout(tuple(metadata["features"]), tuple(metadata["targets"]), bool(config.targets))
        models = [_load_model(folder, number, config, layout) for number in range(metadata["models"])]
        ridge = Ridge.from_tensors(load_arrays(folder / "ridge.safetensors"))
        return SavedEnsemble(Ensemble(config, layout, models, ridge), metrics, metadata)
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{folder} is not an ensemble that this version of mambakit can read ({reason})") from error


def _load_model(folder: Path, number: int, config: StreamConfig, layout: Layout) -> StreamModel:
    model = StreamModel(config, len(layout.features), len(layout.targets))
    with torch.no_grad():
        load_weights(model, load_file(folder / f"model-{number}.safetensors"))
    return model.eval()


def describe(trained: TrainedEnsemble, data: str) -> dict[str, Any]:
    """What a later reader needs to know: what was trained, on which data, by which software, how long it took."""
    ensemble = trained.ensemble
    return {
        "training_date": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": len(ensemble.models),
        "parameters": parameters(ensemble.models[0]),
        "features": list(ensemble.layout.features),
        "targets": list(ensemble.layout.targets),
        "data": data,
        "sequences": trained.parts,
        "training_config": trained.training.model_dump(mode="json"),
        "seconds": sum(record.seconds for record in trained.records),
        "software": {
            "mambakit": _version("mambakit"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
