"""Ensembles with random weights: predictions large enough that agreement means something, and no time in training."""

import torch

from mambakit.stream.config import StreamConfig
from mambakit.stream.data import Sequences
from mambakit.stream.ensemble import Ensemble
from mambakit.stream.model import untrained_model
from mambakit.stream.ridge import fit_ridge

KINDS = ("mamba", "mamba2", "mamba3", "s4d", "gru", "lstm")
EVERYTHING = {"features": "engineered", "normalise": True, "residual": True}


def random_ensemble(sequences: Sequences, num_models: int = 2, **settings: object) -> Ensemble:
    """An ensemble of the small size given by default, its heads random instead of zero."""
    config = StreamConfig.model_validate({"d_model": 16, "n_layers": 2, **settings})
    models = []
    for number in range(num_models):
        model = untrained_model(config, sequences.states.shape[-1], sequences.targets.shape[-1], number).eval()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in (model.head.weight, model.head.bias):
                parameter.normal_(generator=generator)
        models.append(model)
    return Ensemble(config, sequences.layout, models, fit_ridge(sequences, config.ridge_lags))
