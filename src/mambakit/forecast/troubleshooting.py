"""What to try when training is slow or a forecast has no skill: only what applies to the case at hand."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from mambakit.forecast.config import MambaConfig
from mambakit.forecast.evaluation import MODEL, Evaluation
from mambakit.forecast.significance import holm
from mambakit.training import TrainingConfig

SLOW_SECONDS = 120.0  # of training one symbol, before anything is said
ENOUGH_DAYS = 2000
_LONG_WINDOW = 120  # days
_SMALL_BATCH = 32
_SIGNIFICANCE = 0.05
_IMPLAUSIBLE_R2 = 0.1  # of daily returns, against the random walk: published linear models reach 0.01


def slow_training_hints(config: MambaConfig, training: TrainingConfig) -> list[str]:
    """Reasons why training is slower on this machine than it could be, each with the way out."""
    import torch

    from mambakit.ops import dispatch

    hints = []
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if torch.cuda.is_available() and not on_gpu:
        hints.append("a GPU is there, and ACCELERATE_USE_CPU keeps training away from it")
    if not on_gpu:
        if dispatch.choose(torch.device("cpu")) != "cpu":
            hints.append("the compiled kernels do not serve (`mambakit doctor` says why): install with a C++ compiler")
    elif training.mixed_precision == "no":
        hints.append("on a GPU mixed_precision='bf16' is faster")
    if config.training_mode == "sequence":
        return hints
    hints.append("windows read each day many times over: training_mode='sequence' reads it once")
    if config.sequence_length > _LONG_WINDOW:
        hints.append(f"windows have {config.sequence_length} days: lower sequence_length")
    if training.batch_size < _SMALL_BATCH:
        hints.append(f"batches have {training.batch_size} windows: raise batch_size, if memory allows")
    return hints


def poor_prediction_hints(evaluations: Iterable[Evaluation], metadata: Iterable[Mapping[str, Any]]) -> list[str]:
    """What may help symbols without skill, from their evaluations and the metadata they were stored with.

    Empty where each symbol has skill beyond random walk and drift at some horizon. An implausible skill is a hint too.
    """
    hints: list[str] = []
    for evaluation, stored in zip(evaluations, metadata, strict=True):
        hints += [
            f"{evaluation.symbol}: R² of {score.r2_random_walk:.2f} on daily returns is too good to be true: "
            "look for prices of the future among the inputs"
            for score in evaluation.scores
            if score.forecaster == MODEL and score.horizon == 1 and score.r2_random_walk > _IMPLAUSIBLE_R2
        ]
        if min(holm([comparison.p_value for comparison in evaluation.comparisons])) >= _SIGNIFICANCE:
            hints += _hints_without_skill(evaluation.symbol, stored)
    return hints


def _hints_without_skill(symbol: str, stored: Mapping[str, Any]) -> list[str]:
    days, performance = stored["data_stats"]["days"], stored["performance_metrics"]
    hints = []
    if days < ENOUGH_DAYS:
        hints.append(f"{symbol}: train on more than these {days} days, {ENOUGH_DAYS} or more")
    if performance["best_epoch"] == 0:
        hints.append(f"{symbol}: no epoch improved on the drift: lower the learning rate or the model's size")
    elif performance["best_epoch"] == performance["total_epochs"]:
        hints.append(f"{symbol}: the last epoch was the best: train for more epochs")
    if not stored["model_config"].get("include_volume"):
        hints.append(
            f"{symbol}: let the model read volume too (include_volume, in MambaConfig or a file for --settings)"
        )
    return hints
