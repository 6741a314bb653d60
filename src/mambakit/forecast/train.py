"""Training one symbol: the first part teaches the network, the second stops and shrinks it, the third judges it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.forecast.baselines import PointForecast, baseline_forecasts
from mambakit.forecast.config import FORECAST_TRAINING, QUANTILES
from mambakit.forecast.dataset import PreparedSeries, WindowData
from mambakit.forecast.evaluation import MODEL, Evaluation, evaluate
from mambakit.forecast.model import (
    Distribution,
    MambaModel,
    forecast_loss,
    volatility_at_horizons,
)
from mambakit.forecast.significance import overlapping_error
from mambakit.training import Objective, TrainingConfig, TrainingRecord, fit

_SAMPLES_AT_ONCE = 256  # bounds the memory of a forward pass without gradients


@dataclass(frozen=True)
class TrainedForecaster:
    """A trained network, how it came about, and how it did on the test part."""

    prepared: PreparedSeries
    model: MambaModel
    training: TrainingConfig
    record: TrainingRecord
    evaluation: Evaluation
    test_forecasts: dict[str, PointForecast]  # the model's and each baseline's, for the samples of the test part


def train_single_symbol(
    prepared: PreparedSeries,
    training: TrainingConfig = FORECAST_TRAINING,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> TrainedForecaster:
    """Train on one prepared series and judge the outcome.

    Args:
        run_dir: where checkpoints go, so that a killed run can be resumed; none are written without it.
        resume: go on from the checkpoints in run_dir.
        quiet: no progress bar.

    Raises:
        TrainingDiverged: the loss stopped being finite.
    """
    split = prepared.split
    model = untrained_model(prepared, training.seed)
    record = fit(
        model,
        _objective(prepared.config.prediction_horizons),
        prepared.part(split.training),
        prepared.part(split.validation),
        training,
        run_dir=run_dir,
        resume=resume,
        quiet=quiet,
        description=prepared.series.symbol,
    )
    model.cpu()  # training may have moved it; one symbol's windows are few
    shrink_mean(model, prepared.part(split.validation))
    distribution = forecast_windows(model, prepared.part(split.test))
    mean, quantiles = distribution.mean.double().numpy(), distribution.quantiles.double().numpy()
    forecasts = {
        MODEL: PointForecast(mean, quantiles[..., QUANTILES.index(0.1)], quantiles[..., QUANTILES.index(0.9)]),
        **baseline_forecasts(prepared, split.test),
    }
    evaluation = evaluate(
        prepared.series.symbol,
        prepared.config.prediction_horizons,
        prepared.returns[split.test],
        forecasts,
        quantiles,
        prepared.returns[split.training],
    )
    return TrainedForecaster(prepared, model, training, record, evaluation, forecasts)


def untrained_model(prepared: PreparedSeries, seed: int) -> MambaModel:
    """A network that forecasts the training part's drift and, scaled by today's volatility, its quantiles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MambaModel(prepared.config, prepared.features.shape[1])
    known = prepared.part(prepared.split.training).everything()
    model.start_from(known["returns"], known["volatility"])
    return model


def _objective(horizons: tuple[int, ...]) -> Objective:
    def objective(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        forecast: Distribution = model(batch["features"], batch["volatility"])
        return forecast_loss(forecast, batch["returns"], volatility_at_horizons(batch["volatility"], horizons))

    return objective


def shrink_mean(model: MambaModel, validation: WindowData) -> None:
    """Set the model's shrinkage to what the validation part supports, horizon by horizon."""
    horizons = model.config.prediction_horizons
    known = validation.everything()
    scale = volatility_at_horizons(known["volatility"], horizons)
    model.shrinkage.fill_(1.0)
    departure = (forecast_windows(model, validation).mean - model.drift) / scale
    left = (known["returns"] - model.drift) / scale
    factors = [
        measure_shrinkage(departure[:, column].double().numpy(), left[:, column].double().numpy(), horizon)
        for column, horizon in enumerate(horizons)
    ]
    model.shrinkage.copy_(torch.tensor(factors))


def measure_shrinkage(departure: np.ndarray, residual: np.ndarray, horizon: int) -> float:
    """How much of a departure (samples,) to believe that meets residuals (samples,): from 0, nothing, to 1, all.

    The k that minimises sum (residual - k departure)^2, less its standard error: a validation part has only a few
    dozen samples of a long horizon that do not overlap, and half of all chance departures have k above 0 in it.
    """
    power = float((departure**2).mean())
    if power == 0.0:
        return 0.0
    best = float((departure * residual).mean()) / power
    error = overlapping_error(departure * (residual - best * departure), horizon) / power
    return min(max(best - error, 0.0), 1.0)


@torch.no_grad()
def forecast_windows(model: MambaModel, data: WindowData) -> Distribution:
    """The model's forecast for every sample, in the order of the data."""
    model.eval()
    batches = [data.batch(indices) for indices in torch.arange(len(data)).split(_SAMPLES_AT_ONCE)]
    parts = [model(batch["features"], batch["volatility"]) for batch in batches]
    return Distribution(*(torch.cat(values) for values in zip(*parts, strict=True)))
