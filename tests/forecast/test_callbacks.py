"""What a run leaves: its metrics as JSON, its checkpoints, its stopping."""

import json
from pathlib import Path

import pytest

from mambakit.errors import DataError
from mambakit.forecast.callbacks import MetricsTracker, TrainingCallbacks
from mambakit.forecast.config import SEQUENCE_TRAINING
from mambakit.forecast.train import train_prepared


def test_metrics_are_kept_epoch_by_epoch_and_saved(tmp_path: Path) -> None:
    tracker = MetricsTracker(save_dir=tmp_path, symbol="aapl")
    for epoch, loss in enumerate([0.9, 0.7, 0.8], start=1):
        tracker.update(
            epoch=epoch, train_loss=loss + 0.1, val_loss=loss, train_mae=0.02, val_mae=0.03, lr=1e-3, epoch_time=2.0
        )
    path = tracker.save()
    assert path == tmp_path / "metrics" / "AAPL_metrics.json"
    stored = json.loads(path.read_text())
    assert stored["summary"] == tracker.get_summary()
    assert stored["summary"] == {
        "symbol": "AAPL",
        "best_val_loss": 0.7,
        "best_epoch": 2,
        "total_epochs": 3,
        "final_train_loss": pytest.approx(0.9),
        "final_val_loss": 0.8,
        "total_time": 6.0,
    }
    assert [epoch["val_loss"] for epoch in stored["epochs"]] == [0.9, 0.7, 0.8]


def test_an_epoch_that_goes_back_is_refused(tmp_path: Path) -> None:
    tracker = MetricsTracker(tmp_path, "AAPL")
    with pytest.raises(DataError, match="call update first"):
        tracker.get_summary()
    tracker.update(3, 0.1, 0.2)
    with pytest.raises(DataError, match="after 3, got 3"):
        tracker.update(3, 0.1, 0.2)


def test_a_training_with_callbacks_stops_on_its_patience_and_leaves_its_metrics(prepared, tmp_path: Path) -> None:
    callbacks = TrainingCallbacks(save_dir=tmp_path, symbol="WALK", patience=2, min_delta=10.0)
    settings = callbacks.settings(SEQUENCE_TRAINING.model_copy(update={"epochs": 20}))
    assert (settings.schedule, settings.patience, settings.min_delta) == ("plateau", 2, 10.0)
    trained = train_prepared(prepared, settings, quiet=True, **callbacks.hooks())
    summary = callbacks.metrics.get_summary()
    assert summary["total_epochs"] == 2  # nothing falls by 10
    assert summary["best_val_loss"] == trained.record.best_validation_loss
    assert summary["best_epoch"] == trained.record.best_epoch
    assert (tmp_path / "metrics" / "WALK_metrics.json").exists()
    assert (tmp_path / "checkpoints" / "WALK" / "checkpoints").is_dir()
    entries = callbacks.metrics.epochs
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert 0 < entries[1]["val_mae"] < 0.2
    assert entries[1]["lr"] == trained.record.history[1]["learning_rate"]


def test_a_symbol_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a symbol"):
        TrainingCallbacks(tmp_path, "../AAPL")
