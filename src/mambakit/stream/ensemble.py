"""Several networks of one kind that differ by their seeds, predicting together: their mean, and ridge if residual.

prediction = mean_k model_k(inputs) (+ ridge(states))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.stream.config import StreamConfig
from mambakit.stream.data import Layout
from mambakit.stream.dataset import model_inputs
from mambakit.stream.model import StreamModel
from mambakit.stream.ridge import Ridge

_SEQUENCES_AT_ONCE = 16


@dataclass(frozen=True)
class Ensemble:
    """Trained networks and the baseline fitted on the same sequences."""

    config: StreamConfig
    layout: Layout
    models: Sequence[StreamModel]
    ridge: Ridge

    def require_fit(self, layout: Layout) -> None:
        """Raise DataError unless a table with this layout has the features and targets that the networks learnt."""
        for what, ours, theirs in (
            ("features", self.layout.features, layout.features),
            ("targets", self.layout.targets, layout.targets),
        ):
            if ours != theirs:
                raise DataError(
                    f"the model was trained on {len(ours)} {what} ({_ends(ours)}) and the file has "
                    f"{len(theirs)} ({_ends(theirs)})"
                )

    def predict(self, states: np.ndarray) -> np.ndarray:
        """Whole sequences at once: (sequences, steps, features) to (sequences, steps, targets), float32."""
        return np.asarray(self.predict_each(states).mean(axis=0, dtype=np.float64), dtype=np.float32)

    @torch.no_grad()
    def predict_each(self, states: np.ndarray) -> np.ndarray:
        """What every network predicts by itself: (models, sequences, steps, targets) float32."""
        parts = []
        for first in range(0, len(states), _SEQUENCES_AT_ONCE):
            some = states[first : first + _SEQUENCES_AT_ONCE]
            inputs = torch.from_numpy(model_inputs(self.config, some))
            each = np.stack([_predicted(model, inputs) for model in self.models])
            parts.append(each + self.ridge.predict(some) if self.config.residual else each)
        return np.concatenate(parts, axis=1)


def _predicted(model: StreamModel, inputs: torch.Tensor) -> np.ndarray:
    model.eval()
    device = next(model.parameters()).device
    return model(inputs.to(device))[0].float().cpu().numpy()


def _ends(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]}"
