"""Training many symbols: what could fail is checked for all of them first, then each is trained, judged and stored."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mambakit.errors import TrainingDiverged
from mambakit.forecast.artefact import SavedForecaster, load_forecaster, save_forecaster
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.dataset import PreparedSeries, prepare_series
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.registry import PRODUCTION, ModelRegistry
from mambakit.forecast.train import train_single_symbol
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import remove_folder


@dataclass(frozen=True)
class Outcome:
    """What became of one symbol."""

    symbol: str
    version: str
    evaluation: Evaluation
    reused: bool  # a finished version of an interrupted run, taken over as it is
    training_seconds: float
    storing_seconds: float  # judging aside: files, figures, checksums


def prepare_all(series: Sequence[PriceSeries], config: MambaConfig, registry: ModelRegistry) -> list[PreparedSeries]:
    """Check every series and its folder, and make features, before any time is spent on training.

    Raises DataError for a series that can't be used, ArtefactError for a folder that can't be written.
    """
    for each in series:
        registry.require_writable(each.symbol)
    return [prepare_series(each, config) for each in series]


def train_and_store(
    prepared: PreparedSeries,
    training: TrainingConfig,
    registry: ModelRegistry,
    *,
    resume: bool = False,
    quiet: bool = False,
    alias: str | None = PRODUCTION,
) -> Outcome:
    """Train one symbol and store it as the next version, which becomes production or what `alias` says.

    With `resume`, a killed training goes on from its last checkpoint, and a symbol that the killed run had already
    stored, from the same settings and data, is taken over as it is.
    """
    symbol = prepared.series.symbol
    if resume and not registry.interrupted(symbol):
        finished = _same_training(prepared, training, registry)
        if finished is not None:
            return Outcome(symbol, finished.version, finished.evaluation, True, 0.0, 0.0)
    with registry.run_folder(symbol) as run_dir:
        started = time.perf_counter()
        try:
            trained = train_single_symbol(prepared, training, run_dir=run_dir, resume=resume, quiet=quiet)
        except TrainingDiverged:
            remove_folder(run_dir / "checkpoints")  # resuming would only diverge again
            raise
        between = time.perf_counter()
        version = registry.store(symbol, lambda folder, name: save_forecaster(folder, trained, name), alias)
    return Outcome(symbol, version, trained.evaluation, False, between - started, time.perf_counter() - between)


def _same_training(
    prepared: PreparedSeries, training: TrainingConfig, registry: ModelRegistry
) -> SavedForecaster | None:
    """The newest stored version, if it was trained with these settings on these prices."""
    versions = registry.versions(prepared.series.symbol)
    if not versions:
        return None
    saved = load_forecaster(registry.find(prepared.series.symbol, versions[-1]))
    same = (
        saved.config == prepared.config
        and saved.metadata["training_config"] == training.model_dump(mode="json")
        and saved.metadata["data_stats"]["sha256"] == prepared.series.fingerprint
    )
    return saved if same else None
