"""Training an ensemble: whole sequences, a loss at every scored step, parts split by sequence, one network a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.stream.config import STREAM_TRAINING, StreamConfig
from mambakit.stream.contest import Metric, target_scores
from mambakit.stream.data import Sequences, split_sequences
from mambakit.stream.dataset import SequenceData
from mambakit.stream.ensemble import Ensemble
from mambakit.stream.model import StreamModel, untrained_model
from mambakit.stream.ridge import fit_ridge
from mambakit.training import Objective, TrainingConfig, TrainingRecord, fit
from mambakit.training.batches import derived_seed

VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class TrainedEnsemble:
    """An ensemble, how it came about, and how it does on the validation part."""

    ensemble: Ensemble
    training: TrainingConfig
    records: list[TrainingRecord]
    scores: dict[str, Any]  # see `validation_scores`
    parts: dict[str, int]  # sequences in each part


def train_ensemble(
    sequences: Sequences,
    config: StreamConfig,
    training: TrainingConfig = STREAM_TRAINING,
    num_models: int = 3,
    *,
    validation_share: float = VALIDATION_SHARE,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_model: Callable[[int, TrainingRecord], None] | None = None,
) -> TrainedEnsemble:
    """Train `num_models` networks that differ by their seeds, on one split drawn by training.seed.

    Args:
        run_dir: where checkpoints go, so that a killed run can be resumed; none are written without it.
        resume: go on from the checkpoints in run_dir.
        on_model: called with the number of each network, from 0, and its record, when it is trained.

    Raises:
        DataError: there are too few sequences, or no step is scored.
        TrainingDiverged: a loss stopped being finite.
    """
    learnt, held_out = split_sequences(sequences, validation_share, training.seed)
    ridge = fit_ridge(learnt, config.ridge_lags)
    training_data, validation_data = SequenceData(learnt, config, ridge), SequenceData(held_out, config, ridge)
    models, records = [], []
    for number in range(num_models):
        seed = derived_seed(training.seed, number)
        model = untrained_model(config, sequences.states.shape[-1], sequences.targets.shape[-1], seed)
        record = fit(
            model,
            make_objective(config.metric, training_data.variance),
            training_data,
            validation_data,
            training.model_copy(update={"seed": seed}),
            run_dir=None if run_dir is None else run_dir / f"model-{number}",
            resume=resume,
            quiet=quiet,
            description=f"{config.kind} {number + 1}/{num_models}",
        )
        models.append(model)
        records.append(record)
        if on_model is not None:
            on_model(number, record)
    ensemble = Ensemble(config, sequences.layout, models, ridge)
    scores = validation_scores(ensemble, held_out)
    for model in models:
        model.cpu()
    return TrainedEnsemble(ensemble, training, records, scores, {"training": len(learnt), "validation": len(held_out)})


def make_objective(metric: Metric, variance: Tensor) -> Objective:
    """Squared error over the variance of each target, at the scored steps; for "pearson" with weights |target|.

    With unit weights and the training part's variance that is 1 - R2, the mean over the targets.
    """

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        prediction, _ = model(batch["inputs"])
        weight = batch["scored"][..., None].float()  # (batch, steps, 1)
        if metric == "pearson":
            weight = weight * batch["wanted"].abs()
        errors = weight * (prediction.float() - batch["targets"]).square()  # (batch, steps, targets)
        total = weight.expand_as(errors).sum(dim=(0, 1)).clamp(min=torch.finfo(torch.float32).tiny)
        return (errors.sum(dim=(0, 1)) / total / variance.to(errors.device)).mean(), {}

    return objective


def validation_scores(ensemble: Ensemble, held_out: Sequences) -> dict[str, Any]:
    """The metric of the ensemble, each of its networks, ridge, and (where that is a prediction) repeating the state.

    A dict of "metric", "ensemble", "models", "ridge", "repeat", and "targets": the ensemble's score by target.
    """
    metric, names = ensemble.config.metric, ensemble.layout.targets
    truth = held_out.targets[held_out.scored]

    def scores(predictions: np.ndarray) -> dict[str, float]:
        return target_scores(truth, predictions[held_out.scored], names, metric)

    each = ensemble.predict_each(held_out.states)
    whole = scores(each.mean(axis=0, dtype=np.float64))
    mean = f"mean_{metric}"
    return {
        "metric": metric,
        "ensemble": whole[mean],
        "models": [scores(one)[mean] for one in each],
        "ridge": scores(ensemble.ridge.predict(held_out.states))[mean],
        "repeat": None if ensemble.layout.same_row else scores(held_out.states)[mean],
        "targets": {name: whole[name] for name in names},
    }


def parameters(model: StreamModel) -> int:
    """How many numbers a network has."""
    return sum(parameter.numel() for parameter in model.parameters())
