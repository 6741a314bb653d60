"""Training one symbol: the first part teaches the network, the second stops and shrinks it, the third judges it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.forecast.baselines import baseline_forecasts
from mambakit.forecast.config import FORECAST_TRAINING
from mambakit.forecast.dataset import PreparedSeries, WindowData
from mambakit.forecast.evaluation import MODEL, Evaluation, evaluate
from mambakit.forecast.model import (
    Distribution,
    MambaModel,
    forecast_loss,
    volatility_at_horizons,
)
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import Predictions
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
    test: OutOfSample  # the model's and each baseline's predictions for the test part, and what came


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
    model, record = train_network(prepared, training, run_dir=run_dir, resume=resume, quiet=quiet)
    test = out_of_sample(prepared, prepared.split.test, model)
    return TrainedForecaster(prepared, model, training, record, evaluate(test), test)


def train_network(
    prepared: PreparedSeries,
    training: TrainingConfig,
    *,
    backbone: nn.Module | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    description: str | None = None,
) -> tuple[MambaModel, TrainingRecord]:
    """Teach a network on the training part; stop and shrink it on the validation part. The test part is not read.

    Args:
        backbone: in the place of the Mamba blocks.
        run_dir, resume, quiet: as of `train_single_symbol`.
        description: what the progress bar says; the symbol by default.
    """
    split = prepared.split
    model = untrained_model(prepared, training.seed, backbone)
    record = fit(
        model,
        _objective(prepared.config.prediction_horizons),
        prepared.part(split.training),
        prepared.part(split.validation),
        training,
        run_dir=run_dir,
        resume=resume,
        quiet=quiet,
        description=description or prepared.series.symbol,
    )
    model.cpu()  # training may have moved it; one symbol's windows are few
    shrink_mean(model, prepared.part(split.validation))
    return model, record


def out_of_sample(
    prepared: PreparedSeries,
    samples: np.ndarray,
    model: MambaModel,
    baselines: Mapping[str, Predictions] | None = None,
    fold: int = 0,
) -> OutOfSample:
    """What the model, and the baselines beside it, say of samples that neither has learnt from, and what came."""
    if baselines is None:
        baselines = baseline_forecasts(prepared, samples).predictions
    usual_change = np.abs(prepared.returns[prepared.split.training]).mean(axis=0)
    days = prepared.origins[samples]
    return OutOfSample(
        symbol=prepared.series.symbol,
        horizons=prepared.config.prediction_horizons,
        dates=prepared.series.dates[days],
        fold=np.full(len(samples), fold),
        actual=prepared.returns[samples],
        volatility=prepared.volatility[days],
        usual_change=np.tile(usual_change, (len(samples), 1)),
        predictions={MODEL: network_predictions(model, prepared.part(samples)), **baselines},
    )


def network_predictions(model: MambaModel, data: WindowData) -> Predictions:
    """The model's predictions for every sample, computed in a few batches."""
    distribution = forecast_windows(model, data)
    return Predictions(distribution.mean.double().numpy(), distribution.quantiles.double().numpy())


def untrained_model(prepared: PreparedSeries, seed: int, backbone: nn.Module | None = None) -> MambaModel:
    """A network that forecasts the training part's drift and, scaled by today's volatility, its quantiles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MambaModel(prepared.config, prepared.features.shape[1], backbone)
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
