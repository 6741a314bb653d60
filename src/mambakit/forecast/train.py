"""Training one series: the first part teaches the network, the second stops and shrinks it, the third judges it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.forecast.baselines import baseline_forecasts
from mambakit.forecast.config import default_training
from mambakit.forecast.conformal import conformal_offsets
from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.evaluation import MODEL, Evaluation, evaluate
from mambakit.forecast.model import Distribution, MambaModel, forecast_loss
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.predictions import Predictions
from mambakit.forecast.samples import Batch, SequenceData, WindowData
from mambakit.forecast.shrinkage import shrink_mean, shrink_width
from mambakit.training import TrainingConfig, TrainingRecord, fit
from mambakit.training.record import EpochEntry
from mambakit.training.tracking import Tracking

_SAMPLES_AT_ONCE = 256  # windows; bounds the memory of a forward pass without gradients


@dataclass(frozen=True)
class TrainedForecaster:
    """A trained network, how it came about, and how it did on the test part."""

    prepared: PreparedSeries
    model: MambaModel
    training: TrainingConfig
    record: TrainingRecord
    evaluation: Evaluation
    test: OutOfSample  # the model's and each baseline's predictions for the test part, and what came
    judging_seconds: float = 0.0  # baselines and tests; the record has the seconds of the training


def train_prepared(
    prepared: PreparedSeries,
    training: TrainingConfig | None = None,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
) -> TrainedForecaster:
    """Train on one prepared series and judge the outcome.

    The outcome depends on the series, its configuration and the training's settings, its seed included, and on nothing
    else: not on what was trained before in this process, nor on the number of threads, which is one on the CPU.

    Args:
        training: by default what suits the configuration's mode, see `default_training`.
        run_dir: where checkpoints go, so that a killed run can be resumed; none are written without it.
        resume: go on from the checkpoints in run_dir.
        quiet: no progress bar.
        on_epoch: called with each entry of the history.
        tracking: where the history is sent to as well.

    Raises:
        TrainingDiverged: the loss stopped being finite.
    """
    settings = default_training(prepared.config.training_mode) if training is None else training
    if not len(prepared.split.test):
        raise DataError(f"{prepared.series.symbol}: the split has no test part to judge by")
    with one_thread():
        model, record = train_network(
            prepared,
            settings,
            run_dir=run_dir,
            resume=resume,
            quiet=quiet,
            on_epoch=on_epoch,
            tracking=tracking,
        )
        started = time.perf_counter()
        test = out_of_sample(prepared, prepared.split.test, model)
        evaluation = evaluate(test)
    judged = time.perf_counter() - started
    return TrainedForecaster(prepared, model, settings, record, evaluation, test, judged)


def train_network(
    prepared: PreparedSeries,
    settings: TrainingConfig,
    *,
    backbone: nn.Module | None = None,
    calibrated: bool = True,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    description: str | None = None,
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
) -> tuple[MambaModel, TrainingRecord]:
    """Teach a network on the training part; stop, shrink and calibrate it on the validation part.

    The test part is not read.

    Args:
        backbone: in the place of the blocks of the configuration's mixer.
        calibrated: move the quantiles by the conformal offsets of the validation part.
        description: what the progress bar says; the symbol by default.

    The rest is as of `train_prepared`.
    """
    split = prepared.split
    with one_thread():
        model = untrained_model(prepared, settings.seed, backbone)
        record = fit(
            model,
            objective,
            prepared.training_part(),
            prepared.part(split.validation),
            settings,
            run_dir=run_dir,
            resume=resume,
            quiet=quiet,
            description=description or prepared.series.symbol,
            on_epoch=on_epoch,
            tracking=tracking,
        )
        model.cpu()  # training may have moved it; one symbol's days are few
        shrink(model, prepared.part(split.validation), prepared.at_origins(split.validation)["returns"])
        if calibrated:
            calibrate(model, prepared)
    return model, record


@torch.no_grad()
def calibrate(model: MambaModel, prepared: PreparedSeries) -> None:
    """Set the model's calibration to the conformal offsets of the validation part."""
    validation = prepared.split.validation
    model.calibration.zero_()
    forecast = forecast_samples(model, prepared.part(validation))
    offsets = conformal_offsets(
        forecast.quantiles.double().numpy(),
        prepared.returns[validation],
        forecast.scale.double().numpy(),
        horizons=prepared.config.prediction_horizons,
    )
    model.calibration.copy_(torch.from_numpy(offsets))


def out_of_sample(
    prepared: PreparedSeries,
    samples: np.ndarray,
    model: MambaModel,
    baselines: Mapping[str, Predictions] | None = None,
    *,
    fold: int = 0,
    symbol: int = 0,
) -> OutOfSample:
    """What the model, and the baselines beside it, say of samples that neither has learnt from, and what came.

    Args:
        symbol: its number in a pooled model.
    """
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
        predictions={MODEL: network_predictions(model, prepared.part(samples), symbol), **baselines},
    )


def network_predictions(model: MambaModel, data: WindowData | SequenceData, symbol: int | None = None) -> Predictions:
    """The model's predictions for every sample; see `forecast_samples`."""
    distribution = forecast_samples(model, data, symbol)
    return Predictions(distribution.mean.double().numpy(), distribution.quantiles.double().numpy())


def untrained_model(prepared: PreparedSeries, seed: int, backbone: nn.Module | None = None) -> MambaModel:
    """A network that forecasts the training part's drift and, scaled by the volatility ahead, its quantiles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MambaModel(prepared.config, prepared.features.shape[1], backbone=backbone)
    model.start_from(**prepared.at_origins(prepared.split.training))
    return model


def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """What the training loop minimises: the loss of windows, or of every day that counts of sequences."""
    forecast: Distribution = model(batch["features"], batch["volatility"], batch["terms"], batch.get("symbol"))
    return forecast_loss(forecast, batch["returns"], batch.get("counted"))


@torch.no_grad()
def shrink(
    model: MambaModel, validation: WindowData | SequenceData, returns: Tensor, days: np.ndarray | None = None
) -> None:
    """Set both of the model's shrinkages to what the validation part, with its returns (samples, horizons), supports.

    Args:
        days: (samples,) each sample's day, where several symbols share days.
    """
    model.shrinkage.fill_(1.0)
    model.width_shrinkage.fill_(1.0)
    whole = forecast_samples(model, validation)
    model.width_shrinkage.fill_(0.0)
    unwidened = forecast_samples(model, validation)
    span = whole.quantiles[..., -1] - whole.quantiles[..., 0]
    width = span / (unwidened.quantiles[..., -1] - unwidened.quantiles[..., 0])
    shrink_mean(model, whole, returns, model.drift[validation.symbols], days)
    shrink_width(model, whole, returns, width, days)


@torch.no_grad()
def forecast_samples(model: MambaModel, data: WindowData | SequenceData, symbol: int | None = None) -> Distribution:
    """The model's forecast for every sample, or every day that counts, in the order of the data.

    Args:
        symbol: take this number for all of them instead of the data's own.
    """
    model.eval()
    parts = []
    if isinstance(data, WindowData):
        for indices in torch.arange(len(data)).split(_SAMPLES_AT_ONCE):
            batch = data.batch(indices)
            parts.append(model(batch["features"], batch["volatility"], batch["terms"], _numbers(batch, symbol)))
    else:
        for index in torch.arange(len(data)):
            batch = data.batch(index[None])
            counted = batch["counted"][0] > 0
            forecast = model(batch["features"], batch["volatility"], batch["terms"], _numbers(batch, symbol))
            parts.append(Distribution(*(values[0, counted] for values in forecast)))
    return Distribution(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _numbers(batch: Batch, symbol: int | None) -> Tensor | None:
    own = batch.get("symbol")
    if symbol is None:
        return own
    return torch.full((len(batch["features"]),), symbol)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, then with as many as before.

    The order of sums in a product of matrices depends on the number of threads, and so would the outcome of a training.
    What there is to gain from more is small for networks of this size; symbols are trained side by side instead.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
