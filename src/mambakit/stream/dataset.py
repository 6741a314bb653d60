"""Sequences in the form that the training loop asks for, with features made and ridge's part taken off."""

import numpy as np
import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.stream.config import StreamConfig
from mambakit.stream.data import Sequences
from mambakit.stream.plain.features import FeatureEngineer
from mambakit.stream.plain.normaliser import SequenceNormalizer
from mambakit.stream.ridge import Ridge

_AT_ONCE = 16  # sequences


def model_inputs(config: StreamConfig, states: np.ndarray) -> np.ndarray:
    """What a model reads, (sequences, steps, inputs) float32, of states (sequences, steps, features)."""
    if config.features == "raw" and not config.normalise:
        return states
    # A few at a time: in float64 and with all that is summed on the way, all of them would take gigabytes.
    return np.concatenate(
        [_transformed(config, states[first : first + _AT_ONCE]) for first in range(0, len(states), _AT_ONCE)]
    )


def _transformed(config: StreamConfig, values: np.ndarray) -> np.ndarray:
    if config.features == "engineered":
        values = FeatureEngineer(values.shape[-1]).transform(values)
    if config.normalise:
        values = SequenceNormalizer(values.shape[-1]).transform(values)
    return values


class SequenceData:
    """Whole sequences by index: one sample is one sequence.

    Args:
        sequences: what to learn from, or to validate on.
        config: features, and whether the target is what ridge leaves over.
        ridge: the fitted baseline; used where config.residual.

    Raises DataError where no step is scored.
    """

    def __init__(self, sequences: Sequences, config: StreamConfig, ridge: Ridge) -> None:
        if not sequences.scored.any():
            raise DataError("no step is scored: need_prediction is False in every row")
        targets = sequences.targets
        if config.residual:
            targets = targets - ridge.predict(sequences.states)
        self._inputs = torch.from_numpy(model_inputs(config, sequences.states))
        self._targets = torch.from_numpy(targets)
        self._wanted = torch.from_numpy(sequences.targets)
        self._scored = torch.from_numpy(sequences.scored)
        truth = sequences.targets[sequences.scored].astype(np.float64)
        variance = truth.var(axis=0)
        # A target that never moves has no R2, and next to nothing to divide by: its error counts as it is.
        still = variance < 1e-10 * (1 + truth.mean(axis=0) ** 2)
        self.variance = torch.from_numpy(np.where(still, 1.0, variance)).float()  # (targets,)

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """inputs and targets (batch, steps, ...), and scored (batch, steps).

        Wanted is the target before ridge's part was taken off: what weights are made of.
        """
        return {
            "inputs": self._inputs[indices],
            "targets": self._targets[indices],
            "wanted": self._wanted[indices],
            "scored": self._scored[indices],
        }
