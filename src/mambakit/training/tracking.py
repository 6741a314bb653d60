"""A run's history sent to TensorBoard, MLflow or Weights & Biases as well, through accelerate's trackers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mambakit.errors import MambakitError
from mambakit.training.config import TrainingConfig
from mambakit.training.record import EpochEntry

if TYPE_CHECKING:
    from accelerate import Accelerator

TrackerKind = Literal["tensorboard", "mlflow", "wandb"]
PROJECT = "mambakit"


@dataclass(frozen=True)
class Tracking:
    """Where a history goes beside the run's own record.

    Files are written below `folder` alone. An address that the environment names (MLFLOW_TRACKING_URI, and those of
    wandb) is used instead, as users of these tools expect.

    Raises MambakitError where the tool is not installed.
    """

    kind: TrackerKind
    folder: Path
    run: str  # the name under which the tool shows it

    def __post_init__(self) -> None:
        package = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}.get(self.kind)
        if package is None:
            raise MambakitError(f"tracker must be tensorboard, mlflow or wandb, got {self.kind!r}")
        if find_spec(package) is None:
            raise MambakitError(f"the tracker {self.kind} is not installed: pip install {package}")

    @contextmanager
    def started(self, accelerator: "Accelerator", config: TrainingConfig) -> Iterator[None]:
        """Trackers of the accelerator, which was made with `log_with` and `project_dir` of this, run in the block."""
        settings = {name: value for name, value in config.model_dump().items() if value is not None}
        arguments: dict[str, dict[str, Any]] = {}
        if self.kind == "mlflow":
            self.folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(self.folder / 'mlflow.db').absolute()}")
            arguments["mlflow"] = {"run_name": self.run, "logging_dir": str(self.folder.absolute() / "artifacts")}
        if self.kind == "wandb":
            self.folder.mkdir(parents=True, exist_ok=True)
            arguments["wandb"] = {"name": self.run, "dir": str(self.folder)}
        accelerator.init_trackers(self.run if self.kind == "tensorboard" else PROJECT, settings, arguments)
        try:
            yield
        finally:
            # Not `end_training`, which takes down the processes' common ground with the trackers.
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.trackers = []

    def send(self, accelerator: "Accelerator", entry: EpochEntry) -> None:
        """Send one entry of the history."""
        values = {name: value for name, value in entry.items() if name != "epoch"}
        accelerator.log(values, step=int(entry["epoch"]))
