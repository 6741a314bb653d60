"""Training an ensemble: whole sequences, a loss at every scored step, parts split by sequence, one network a seed."""

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
from mambakit.stream.ridge import Ridge, fit_ridge
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


@dataclass(frozen=True)
class Parts:
    """Sequences split, and both parts as the training loop reads them."""

    learnt: Sequences
    held_out: Sequences
    ridge: Ridge
    training_data: SequenceData
    validation_data: SequenceData

    def sizes(self) -> dict[str, int]:
        """Sequences in each part."""
        return {"training": len(self.learnt), "validation": len(self.held_out)}


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
) -> TrainedEnsemble:
    """Train `num_models` networks that differ by their seeds, on one split drawn by training.seed.

    Args:
        run_dir: where checkpoints go, so that a killed run can be resumed; none are written without it.
        resume: go on from the checkpoints in run_dir.

    Raises:
        DataError: there are too few sequences, or no step is scored.
        TrainingDiverged: a loss stopped being finite.
    """
    parts = prepare_parts(sequences, config, training, validation_share)
    models, records = [], []
    for number in range(num_models):
        model, record = train_network(
            parts,
            config,
            training,
            number,
            run_dir=None if run_dir is None else run_dir / f"model-{number}",
            resume=resume,
            quiet=quiet,
            description=f"{config.kind} {number + 1}/{num_models}",
        )
        models.append(model)
        records.append(record)
    ensemble = Ensemble(config, sequences.layout, models, parts.ridge)
    scores = validation_scores(ensemble, parts.held_out)
    for model in models:
        model.cpu()
    return TrainedEnsemble(ensemble, training, records, scores, parts.sizes())


def prepare_parts(
    sequences: Sequences, config: StreamConfig, training: TrainingConfig, validation_share: float = VALIDATION_SHARE
) -> Parts:
    """Split by sequence, fit ridge on the training part, make features; the same for every network of an ensemble.

    Raises DataError where there are too few sequences, or no step is scored.
    """
    learnt, held_out = split_sequences(sequences, validation_share, training.seed)
    ridge = fit_ridge(learnt, config.ridge_lags)
    return Parts(learnt, held_out, ridge, SequenceData(learnt, config, ridge), SequenceData(held_out, config, ridge))


def train_network(
    parts: Parts,
    config: StreamConfig,
    training: TrainingConfig,
    number: int,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    description: str = "training",
) -> tuple[StreamModel, TrainingRecord]:
    """Train network `number` of an ensemble, from 0: its seed follows from training.seed and the number."""
    seed = derived_seed(training.seed, number)
    model = untrained_model(config, parts.learnt.states.shape[-1], parts.learnt.targets.shape[-1], seed)
    record = fit(
        model,
        make_objective(config.metric, parts.training_data.variance),
        parts.training_data,
        parts.validation_data,
        training.model_copy(update={"seed": seed}),
        run_dir=run_dir,
        resume=resume,
        quiet=quiet,
        description=description,
    )
    return model, record


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
