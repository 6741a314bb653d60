"""What happens around the epochs of a training: when it stops, where its checkpoints go, and the record it leaves.

callbacks = TrainingCallbacks(save_dir="models/mamba", symbol="AAPL", patience=5, min_delta=0.0001)
trained = train_prepared(prepared, callbacks.settings(), **callbacks.hooks())
print(callbacks.metrics.get_summary())
"""

from pathlib import Path
from typing import Any

from mambakit.errors import DataError
from mambakit.forecast.config import default_training
from mambakit.forecast.prices import parse_symbol
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import write_json
from mambakit.training.record import EpochEntry


class MetricsTracker:
    """The metrics of one run, epoch by epoch, in `<save_dir>/metrics/<symbol>_metrics.json`.

    Used by hand, or handed to the training as `on_epoch=tracker.on_epoch`.

    Args:
        save_dir: the folder that the file's folder is made in.
        symbol: whose run it is.
    """

    def __init__(self, save_dir: str | Path, symbol: str) -> None:
        self.symbol = parse_symbol(symbol)
        self.path = Path(save_dir) / "metrics" / f"{self.symbol}_metrics.json"
        self.epochs: list[dict[str, float | None]] = []

    def update(
        self,
        epoch: int,
        train_loss: float | None,
        val_loss: float,
        train_mae: float | None = None,
        val_mae: float | None = None,
        lr: float | None = None,
        epoch_time: float | None = None,
    ) -> None:
        """Add an epoch; losses as the training counts them, mean absolute errors in log returns, time in seconds.

        Raises DataError where the epoch does not come after the one before it.
        """
        if self.epochs and epoch <= (self.epochs[-1]["epoch"] or 0):
            raise DataError(f"epoch must come after {self.epochs[-1]['epoch']}, got {epoch}")
        values = (epoch, train_loss, val_loss, train_mae, val_mae, lr, epoch_time)
        names = ("epoch", "train_loss", "val_loss", "train_mae", "val_mae", "lr", "epoch_time")
        self.epochs.append(dict(zip(names, values, strict=True)))

    def on_epoch(self, entry: EpochEntry) -> None:
        """Add an entry of the training's history, and save: a run that is killed leaves what it had come to."""
        self.update(
            epoch=int(entry["epoch"]),
            train_loss=entry.get("train_loss"),
            val_loss=entry["validation_loss"],
            train_mae=entry.get("train_mae"),
            val_mae=entry.get("validation_mae"),
            lr=entry.get("learning_rate"),
            epoch_time=entry["seconds"],
        )
        self.save()

    def get_summary(self) -> dict[str, Any]:
        """The best epoch and what it took; raises DataError before the first update."""
        if not self.epochs:
            raise DataError(f"no epoch of {self.symbol} has been recorded yet: call update first")
        best = min(self.epochs, key=lambda epoch: epoch["val_loss"] or 0.0)
        return {
            "symbol": self.symbol,
            "best_val_loss": best["val_loss"],
            "best_epoch": best["epoch"],
            "total_epochs": self.epochs[-1]["epoch"],
            "final_train_loss": self.epochs[-1]["train_loss"],
            "final_val_loss": self.epochs[-1]["val_loss"],
            "total_time": sum(epoch["epoch_time"] or 0.0 for epoch in self.epochs),
        }

    def save(self) -> Path:
        """Write the file, whole or not at all, and return its path."""
        write_json(self.path, {"summary": self.get_summary(), "epochs": self.epochs})
        return self.path


class TrainingCallbacks:
    """Early stopping, a rate that falls on a plateau, checkpoints of every epoch, and metrics, for one symbol's run.

    Where Keras takes a list of objects from `get_keras_callbacks`, the training loop here takes settings and two
    arguments, which do the same: `settings` holds EarlyStopping (patience, min_delta, best weights kept) and
    ReduceLROnPlateau (the schedule "plateau"), `hooks` holds ModelCheckpoint (run_dir) and the metrics (on_epoch).

    Args:
        save_dir: checkpoints go to `<save_dir>/checkpoints/<symbol>/`, metrics to `<save_dir>/metrics/`.
        symbol: whose run it is.
        patience: epochs without a better validation loss before the training stops.
        min_delta: how much lower a loss must be to count as better.
    """

    def __init__(self, save_dir: str | Path, symbol: str, patience: int = 5, min_delta: float = 0.0001) -> None:
        self.symbol = parse_symbol(symbol)
        self.run_dir = Path(save_dir) / "checkpoints" / self.symbol
        self.patience = patience
        self.min_delta = min_delta
        self.metrics = MetricsTracker(save_dir, symbol)

    def settings(self, training: TrainingConfig | None = None) -> TrainingConfig:
        """The settings given, or the default ones, with these callbacks' stopping and the plateau schedule.

        Raises pydantic.ValidationError for a patience below 1 or a negative min_delta.
        """
        base = default_training("sequence") if training is None else training
        changes = {"patience": self.patience, "min_delta": self.min_delta, "schedule": "plateau"}
        return TrainingConfig.model_validate(base.model_dump() | changes)

    def hooks(self) -> dict[str, Any]:
        """Arguments for `train_prepared` or `mambakit.training.fit`."""
        return {"run_dir": self.run_dir, "on_epoch": self.metrics.on_epoch}
