"""A whole ensemble, one tick at a time, in NumPy: embedding, layers, norm, head, and the mean over the networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .mixers import MIXERS, Layer, product, rms_norm

_RIVALS = ("gru", "lstm")  # whose layers have neither norms nor residuals


class PlainEnsemble:
    """Predictions tick by tick.

    Args:
        settings: "kind", "layers" and "eps".
        arrays: by name, "embed", "layers.0.in_proj" and so on, each with an axis of networks in front.
    """

    def __init__(self, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        kind, self._eps = settings["kind"], float(settings["eps"])
        self._rival = kind in _RIVALS
        self._arrays = arrays
        self._norms: list[np.ndarray | None] = []
        self._layers: list[Layer] = []
        for number in range(settings["layers"]):
            prefix = f"layers.{number}."
            weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            self._norms.append(weights.get("before"))
            self._layers.append(MIXERS[kind](weights, self._eps))

    def reset(self) -> None:
        """A new sequence begins."""
        for layer in self._layers:
            layer.reset()

    def step(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs (inputs,) float32 to the mean prediction (targets,) float32; every state moves on."""
        w = self._arrays
        hidden = np.matmul(w["embed"], inputs) + w["embed_bias"]  # (models, d_model)
        for norm, layer in zip(self._norms, self._layers, strict=True):
            # Only rivals have no norm, and then no residual either.
            hidden = layer.step(hidden) if norm is None else hidden + layer.step(rms_norm(hidden, norm, self._eps))
        if not self._rival:
            hidden = rms_norm(hidden, w["norm"], self._eps)
        return np.add.reduce(product(w["head"], hidden) + w["head_bias"], axis=0) / np.float32(len(hidden))
