"""Prediction from a stored ensemble, tick by tick: the recurrent state is carried, no window is replayed."""

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.nn import EnsembleStepper
from mambakit.stream.artefact import load_ensemble
from mambakit.stream.contest import DataPoint
from mambakit.stream.ensemble import Ensemble
from mambakit.stream.plain.ticks import TickReader

DEFAULT_FOLDER = "stream-model"
Precision = Literal["float32", "bfloat16"]


class PredictionModel:
    """The contest's solution: `PredictionModel().predict(data_point)`.

    Args:
        model: the folder that `mambakit stream train --out` wrote, or an ensemble.
        precision: of the weights; "bfloat16" halves what a tick reads, at a cost of about 1e-2 in the predictions.

    Attributes:
        stepper: what takes the steps; its backend is "cpu" where one native call takes a tick through all networks.

    Raises ArtefactError where the folder is no ensemble, DataError for another precision.

    >>> model = PredictionModel("stream-model")  # doctest: +SKIP
    >>> model.predict(DataPoint(seq_ix=0, step_in_seq=0, need_prediction=False, state=state))  # doctest: +SKIP
    """

    def __init__(self, model: str | Path | Ensemble = DEFAULT_FOLDER, precision: Precision = "float32") -> None:
        ensemble = model if isinstance(model, Ensemble) else load_ensemble(model).ensemble
        if precision not in ("float32", "bfloat16"):
            raise DataError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
        networks = list(ensemble.models)
        if precision == "bfloat16":
            networks = [copy.deepcopy(network).to(torch.bfloat16) for network in networks]
        config = ensemble.config
        self.stepper = EnsembleStepper([(network.embed, network.stack, network.head) for network in networks])
        self._ridge = ensemble.ridge.weight.reshape(-1, ensemble.ridge.weight.shape[-1]) if config.residual else None
        self._ridge_bias = ensemble.ridge.bias
        self._reader = TickReader(
            len(ensemble.layout.features),
            config.features == "engineered",
            config.normalise,
            ensemble.ridge.lags if config.residual else 0,
            DataError,
        )

    def predict(self, data_point: DataPoint) -> np.ndarray | None:
        """The prediction (targets,) float32 where the row asks for one, else None; every row moves the state on.

        A change of seq_ix begins a new sequence. Raises DataError, and leaves the state as it was, for a step out of
        order, a state of a wrong width, or one that holds anything but finite numbers.
        """
        values, begins = self._reader.read(data_point.seq_ix, data_point.step_in_seq, data_point.state)
        if begins:
            self.stepper.reset()
        prediction = self.stepper(values)
        if not data_point.need_prediction:
            return None
        if self._ridge is not None:
            prediction += self._reader.lagged.ravel() @ self._ridge + self._ridge_bias
        return prediction
