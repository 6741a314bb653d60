"""Hints name only what applies to the case at hand."""

from dataclasses import replace

import pytest
import torch

from mambakit.forecast.artefact import SavedForecaster
from mambakit.forecast.config import SEQUENCE_TRAINING, MambaConfig
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.troubleshooting import poor_prediction_hints, slow_training_hints


def slow(config: MambaConfig | None = None, **training: object) -> str:
    return " | ".join(slow_training_hints(config or MambaConfig(), SEQUENCE_TRAINING.model_copy(update=training)))


@pytest.fixture
def ready_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, the kernels compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("mambakit.ops.dispatch.choose", lambda device: "cpu")


@pytest.mark.usefixtures("ready_machine")
def test_sequences_on_compiled_kernels_have_no_hint() -> None:
    assert slow() == ""


@pytest.mark.usefixtures("ready_machine")
def test_missing_kernels_windows_long_ones_and_small_batches_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mambakit.ops.dispatch.choose", lambda device: "portable")
    said = slow(MambaConfig(sequence_length=500, training_mode="windows"), batch_size=8)
    assert "training_mode='sequence' reads it once" in said
    assert "mambakit doctor" in said
    assert "windows have 500 days" in said
    assert "batches have 8 windows" in said


@pytest.mark.usefixtures("ready_machine")
def test_a_gpu_that_is_kept_out_or_run_in_full_precision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "ACCELERATE_USE_CPU keeps training away" in slow()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert slow() == "on a GPU mixed_precision='bf16' is faster"
    assert slow(mixed_precision="bf16") == ""


def without_skill(evaluation: Evaluation, p_value: float = 0.5) -> Evaluation:
    return replace(evaluation, comparisons=tuple(replace(each, p_value=p_value) for each in evaluation.comparisons))


def poor(evaluation: Evaluation, saved: SavedForecaster, days: int = 3000, best: int = 2, total: int = 9) -> str:
    stored = {
        **saved.metadata,
        "data_stats": {"days": days},
        "performance_metrics": {"best_epoch": best, "total_epochs": total},
    }
    return " | ".join(poor_prediction_hints([evaluation], [stored]))


def plain(saved: SavedForecaster) -> Evaluation:
    scores = tuple(replace(score, r2_random_walk=0.001) for score in saved.evaluation.scores)
    return replace(saved.evaluation, scores=scores)


def test_a_model_with_skill_needs_no_hint(saved: SavedForecaster) -> None:
    assert poor(without_skill(plain(saved), p_value=1e-6), saved, days=100) == ""


def test_a_model_without_skill_is_told_what_it_may_lack(saved: SavedForecaster) -> None:
    evaluation = without_skill(plain(saved))
    assert "train on more than these 460 days" in poor(evaluation, saved, days=460)
    assert "days" not in poor(evaluation, saved, days=2000)
    assert "no epoch improved on the drift" in poor(evaluation, saved, best=0)
    assert "train for more epochs" in poor(evaluation, saved, best=9)
    assert "include_volume" in poor(evaluation, saved)


def test_skill_too_good_to_be_true_points_at_leakage(saved: SavedForecaster) -> None:
    scores = tuple(replace(score, r2_random_walk=0.9) for score in saved.evaluation.scores)
    said = poor(without_skill(replace(saved.evaluation, scores=scores), p_value=1e-6), saved)
    assert "R² of 0.90 on daily returns is too good to be true" in said
