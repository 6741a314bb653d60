"""What a training run tells: the history of its epochs, and all that follows from it.

The history is a list with one dict for each epoch, epoch 0 being the model before its first step:

    {"epoch": 3, "train_loss": 0.41, "train_<metric>": ..., "validation_loss": 0.44, "validation_<metric>": ...,
     "learning_rate": 9.1e-4, "gradient_norm": 0.7, "seconds": 2.5}

Epoch 0 trains nothing, so it has only "epoch", "validation_...", and "seconds". Best epoch, early stopping and the
plateau schedule are functions of the history and of nothing else: a resumed run cannot disagree with itself.
"""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from mambakit.training.config import TrainingConfig

EpochEntry = dict[str, int | float]


class TrainingRecord(BaseModel):
    """The outcome of `mambakit.training.fit`; plain JSON through `model_dump_json`, NaN written as the string "NaN"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    best_epoch: int
    best_validation_loss: float
    history: list[EpochEntry]
    stopped_early: bool
    parameters: int
    """How many numbers the optimiser may change."""
    seconds: float
    """Time in training and validation, over every start of a resumed run."""


def validation_losses(history: Sequence[EpochEntry]) -> list[float]:
    return [float(entry["validation_loss"]) for entry in history]


def best_epoch(history: Sequence[EpochEntry]) -> int:
    """The first epoch with the lowest validation loss."""
    losses = validation_losses(history)
    return losses.index(min(losses))


def stale_epochs(losses: Sequence[float], min_delta: float) -> list[int]:
    """After each epoch, how many have passed since the loss last fell by more than `min_delta` below its best."""
    to_beat, stale, counts = math.inf, 0, []
    for loss in losses:
        if loss < to_beat - min_delta:
            to_beat, stale = loss, 0
        else:
            stale += 1
        counts.append(stale)
    return counts


def is_finished(history: Sequence[EpochEntry], config: TrainingConfig) -> bool:
    """Whether the last epoch was reached, or the patience is used up."""
    if not history:
        return False
    out_of_patience = (
        config.patience is not None
        and stale_epochs(validation_losses(history), config.min_delta)[-1] >= config.patience
    )
    return out_of_patience or history[-1]["epoch"] == config.epochs


def make_record(history: list[EpochEntry], config: TrainingConfig, parameters: int) -> TrainingRecord:
    """The record of a run that ended with this history."""
    best = best_epoch(history)
    return TrainingRecord(
        best_epoch=best,
        best_validation_loss=validation_losses(history)[best],
        history=history,
        stopped_early=history[-1]["epoch"] < config.epochs,
        parameters=parameters,
        seconds=sum(entry["seconds"] for entry in history),
    )
