"""The `PredictionModel` of a submission: reads weights.json and weights.bin, needs NumPy alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .stepper import PlainEnsemble
from .ticks import TickReader


class SubmittedModel:
    """Predicts as the ensemble that it was packed from.

    Args:
        folder: where weights.json and weights.bin are.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
        flat = np.fromfile(folder / "weights.bin", dtype="<f4").astype(np.float32)
        arrays = {
            name: flat[at : at + int(np.prod(shape))].reshape(shape) for name, (at, shape) in settings["arrays"].items()
        }
        residual = settings["residual"]
        self._ridge = (
            (arrays["ridge"].reshape(-1, arrays["ridge"].shape[-1]), arrays["ridge_bias"]) if residual else None
        )
        lags = settings["lags"] if residual else 0
        self._reader = TickReader(settings["inputs"], settings["engineered"], settings["normalise"], lags)
        self._ensemble = PlainEnsemble(settings, arrays)

    def predict(self, data_point: Any) -> np.ndarray | None:
        """The prediction (targets,) float32 where the row asks for one; every row moves the state on."""
        values, begins = self._reader.read(data_point.seq_ix, data_point.step_in_seq, data_point.state)
        if begins:
            self._ensemble.reset()
        # exp overflows to infinity for gates that are shut, and 1 / infinity is the right zero.
        with np.errstate(over="ignore"):
            prediction = self._ensemble.step(values)
        if not data_point.need_prediction:
            return None
        if self._ridge is not None:
            weight, bias = self._ridge
            prediction = prediction + self._reader.lagged.ravel() @ weight + bias
        return prediction
