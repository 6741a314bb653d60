"""A run's history in a tracking tool, and what happens where that is not there."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.training.toy import squared_error, toy_model, training_data, validation_data

from mambakit.errors import MambakitError
from mambakit.training import TrainingConfig, TrainingRecord, fit
from mambakit.training.tracking import Tracking


def tracked_run(tracking: Tracking | None, epochs: int = 3) -> TrainingRecord:
    config = TrainingConfig(epochs=epochs, batch_size=8, patience=None)
    return fit(toy_model(), squared_error, training_data(), validation_data(), config, quiet=True, tracking=tracking)


def test_tensorboard_gets_every_epoch_in_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    record = tracked_run(Tracking("tensorboard", tmp_path / "runs", "AAPL"))
    events = EventAccumulator(str(tmp_path / "runs" / "AAPL"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("validation_loss")]
    expected = [(entry["epoch"], pytest.approx(entry["validation_loss"])) for entry in record.history]
    assert losses == expected
    assert len(events.Scalars("train_loss")) == 3
    assert list((tmp_path / "here").iterdir()) == []


def test_tracking_changes_nothing_of_the_training_and_a_second_run_is_not_sent(tmp_path: Path) -> None:
    tracked = tracked_run(Tracking("tensorboard", tmp_path, "first"))
    alone = tracked_run(None)
    losses = [[entry["validation_loss"] for entry in record.history] for record in (tracked, alone)]
    assert losses[0] == losses[1]
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_tool_that_is_missing_or_unknown_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(MambakitError, match="tensorboard, mlflow or wandb, got 'comet'"):
        Tracking("comet", tmp_path, "AAPL")  # type: ignore[arg-type]
    absent = [kind for kind in ("mlflow", "wandb") if find_spec(kind) is None]
    for kind in absent:
        with pytest.raises(MambakitError, match=f"pip install {kind}"):
            Tracking(kind, tmp_path, "AAPL")  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_gets_every_epoch_in_the_folder_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    record = tracked_run(Tracking("mlflow", tmp_path / "runs", "AAPL"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.run_name == "AAPL"
    history = client.get_metric_history(run.info.run_id, "validation_loss")
    assert [point.value for point in history] == [entry["validation_loss"] for entry in record.history]
    assert list((tmp_path / "here").iterdir()) == []
