"""A trained forecaster as a folder of plain files, and back: JSON, safetensors, Markdown and PNG, no pickle."""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mambakit.errors import ArtefactError
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.model import MambaModel
from mambakit.forecast.windows import FeatureScaler
from mambakit.training.artefacts import read_json, write_json
from mambakit.training.checkpoint import load_weights

if TYPE_CHECKING:  # serving a model must not wait for what training it takes
    from mambakit.forecast.train import TrainedForecaster


@dataclass(frozen=True)
class SavedForecaster:
    """A stored version, ready to forecast."""

    symbol: str
    version: str
    config: MambaConfig
    model: MambaModel
    scaler: FeatureScaler
    evaluation: Evaluation  # on the test part, made when it was trained
    metadata: dict[str, Any]
    symbols: tuple[str, ...] = ()  # those that a pooled model has met, in the order of their numbers

    def number(self, symbol: str) -> int:
        """The number of a symbol in a pooled model, 0 where it has not met it."""
        return self.symbols.index(symbol) + 1 if symbol in self.symbols else 0


def save_forecaster(folder: Path, trained: "TrainedForecaster", version_name: str) -> None:
    """Fill a folder with everything about a trained forecaster, its model card and its two figures included."""
    from mambakit.forecast.figures import draw_evaluation, draw_fan
    from mambakit.forecast.outofsample import write_records
    from mambakit.forecast.predictor import forecast_series
    from mambakit.forecast.reference import REFERENCE, make_reference
    from mambakit.forecast.report import model_card

    symbol, prepared = trained.prepared.series.symbol, trained.prepared
    metadata = describe(trained, version_name)
    write_model(folder, trained.model, prepared.scaler)
    metrics = {"test": trained.evaluation.to_json(), "training": trained.record.model_dump(mode="json")}
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "metadata.json", metadata)
    write_json(folder / REFERENCE, make_reference(trained).to_json())
    write_records(folder / "test.parquet", [trained.test])
    (folder / "README.md").write_text(model_card(trained.evaluation, metadata), encoding="utf-8")
    saved = SavedForecaster(
        symbol, version_name, prepared.config, trained.model, prepared.scaler, trained.evaluation, metadata
    )
    forecast = forecast_series(saved, prepared.series, covariates=prepared.covariates)
    draw_fan(forecast, prepared.series, folder / "forecast.png")
    draw_evaluation(trained, folder / "evaluation.png")


def write_model(folder: Path, model: MambaModel, scaler: FeatureScaler) -> None:
    """The files that the model is built from again."""
    write_json(folder / "config.json", model.config.model_dump(mode="json"))
    # Not save_file, whose files only their owner can read.
    (folder / "model.safetensors").write_bytes(save(model.state_dict()))
    write_json(folder / "scaler.json", scaler.to_json())


def load_forecaster(folder: Path) -> SavedForecaster:
    """Read a folder that `save_forecaster` filled and whose checksums were verified.

    Raises ArtefactError where its content is not what this version of mambakit writes.
    """
    with _unreadable(folder):
        evaluation = Evaluation.from_json(read_json(folder / "metrics.json")["test"])
        metadata = read_json(folder / "metadata.json")
        symbols = tuple(metadata.get("symbols", ()))
        model, scaler = read_model(folder, len(symbols))
        return SavedForecaster(
            metadata["symbol"], metadata["version"], model.config, model, scaler, evaluation, metadata, symbols
        )


def read_model(folder: Path, n_symbols: int = 0) -> tuple[MambaModel, FeatureScaler]:
    """What `write_model` wrote, ready to forecast; raises ArtefactError where it is something else."""
    with _unreadable(folder):
        config = MambaConfig.model_validate(read_json(folder / "config.json"))
        scaler = FeatureScaler.from_json(read_json(folder / "scaler.json"))
        weights = load_file(folder / "model.safetensors")
        model = MambaModel(config, len(scaler.names), n_symbols)
        with torch.no_grad():
            load_weights(model, weights)
        return model.eval(), scaler


@contextmanager
def _unreadable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{folder} is not a model that this version of mambakit can read ({reason})") from error


def describe(trained: "TrainedForecaster", version_name: str) -> dict[str, Any]:
    """What a later reader needs to know: what was trained, on which data, by which software, how long it took."""
    prepared, record = trained.prepared, trained.record
    series, split = prepared.series, prepared.split

    def days(samples: Any) -> list[str]:
        return [str(series.dates[prepared.origins[samples[end]]]) for end in (0, -1)]

    return {
        "symbol": series.symbol,
        "version": version_name,
        "training_date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_config": prepared.config.model_dump(mode="json"),
        "training_config": trained.training.model_dump(mode="json"),
        "performance_metrics": {
            "best_val_loss": record.best_validation_loss,
            "best_epoch": record.best_epoch,
            "total_epochs": record.history[-1]["epoch"],
            "parameters": record.parameters,
            "seconds": record.seconds,
            "mean_shrinkage": trained.model.shrinkage.tolist(),
            "width_shrinkage": trained.model.width_shrinkage.tolist(),
        },
        "data_stats": {
            "num_samples": len(prepared.origins),
            "avg_return": float(prepared.returns[split.training, 0].mean()),
            "days": len(series),
            "first_day": str(series.dates[0]),
            "last_day": str(series.dates[-1]),
            "sha256": series.fingerprint,
            "covariates_sha256": prepared.covariates_fingerprint,
            "origins": {
                "training": days(split.training),
                "validation": days(split.validation),
                "test": days(split.test),
            },
        },
        "software": software(),
    }


def software() -> dict[str, str | None]:
    """What made a model."""
    return {
        "mambakit": _version("mambakit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the user's working folder, where that is in a repository."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
