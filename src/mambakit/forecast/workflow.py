"""Training many symbols: what could fail is checked for all of them first, then each is trained, judged and stored.

One symbol's failure, of its data or its training, is reported in the end and stops no other.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mambakit.errors import DataError, MambakitError, TrainingDiverged
from mambakit.forecast.artefact import SavedForecaster, load_forecaster, save_forecaster
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.dataset import PreparedSeries, prepare_series
from mambakit.forecast.engines import Engine, Event, Failure, Report, Success, reason_of
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.registry import PRODUCTION, ModelRegistry
from mambakit.forecast.train import TrainedForecaster, train_prepared
from mambakit.training import TrainingConfig, TrainingRecord
from mambakit.training.artefacts import read_json, remove_folder
from mambakit.training.processes import decided_by_first, held_by_first, is_first
from mambakit.training.record import EpochEntry
from mambakit.training.tracking import Tracking


@dataclass(frozen=True)
class Outcome:
    """What became of one symbol."""

    symbol: str
    version: str
    evaluation: Evaluation
    reused: bool  # a finished version of an interrupted run, taken over as it is
    training_seconds: float
    storing_seconds: float  # judging aside: files, figures, checksums
    record: TrainingRecord
    judging_seconds: float = 0.0  # shrinkage aside: baselines and tests


@dataclass(frozen=True)
class TrainHere:
    """Trains one symbol and stores it, on a machine that sees the registry's folder."""

    prepared: PreparedSeries
    training: TrainingConfig
    registry: ModelRegistry
    resume: bool
    alias: str | None = PRODUCTION
    tracking: Tracking | None = None

    @property
    def symbol(self) -> str:
        return self.prepared.series.symbol

    def run(self, report: Report | None, quiet: bool) -> Outcome:
        """See `mambakit.forecast.engines.Job`."""
        return train_and_store(
            self.prepared,
            self.training,
            self.registry,
            resume=self.resume,
            quiet=quiet,
            on_epoch=report,
            tracking=self.tracking,
            alias=self.alias,
        )


@dataclass(frozen=True)
class TrainAnywhere:
    """Trains one symbol on whatever machine; who asked stores what comes back."""

    prepared: PreparedSeries
    training: TrainingConfig

    @property
    def symbol(self) -> str:
        return self.prepared.series.symbol

    def run(self, report: Report | None, quiet: bool) -> TrainedForecaster:
        """See `mambakit.forecast.engines.Job`."""
        return train_prepared(self.prepared, self.training, quiet=quiet, on_epoch=report)


def prepare_all(
    series: Sequence[PriceSeries], config: MambaConfig, registry: ModelRegistry
) -> tuple[list[PreparedSeries], list[Failure]]:
    """Check every series and make its features before any time is spent on training; also what can't be used, and why.

    Raises ArtefactError for a folder that can't be written.
    """
    prepared, failures = [], []
    for each in series:
        registry.require_writable(each.symbol)
        try:
            prepared.append(prepare_series(each, config))
        except DataError as error:
            failures.append(Failure(each.symbol, reason_of(error), 0.0))
    return prepared, failures


def train_all(
    prepared: Sequence[PreparedSeries],
    training: TrainingConfig,
    registry: ModelRegistry,
    engine: Engine,
    *,
    resume: bool = False,
    on_epoch: Callable[[str, EpochEntry], None] = lambda symbol, entry: None,
    tracking: Callable[[str], Tracking | None] = lambda symbol: None,
    alias: str | None = PRODUCTION,
) -> Iterator[Event]:
    """Train and store every series; what became of each, an `Outcome` or why it failed, as soon as it is known.

    Args:
        tracking: where the history of a symbol goes as well; only of an engine that works on this machine.
        alias: what each new version becomes, see `ModelRegistry.store`.
    """
    if engine.sees_our_disk:
        jobs = [TrainHere(each, training, registry, resume, alias, tracking(each.series.symbol)) for each in prepared]
        yield from engine.run(jobs, on_epoch)
        return
    left = []
    for each in prepared:
        finished = _finished(each, training, registry) if resume else None
        if finished is None:
            left.append(TrainAnywhere(each, training))
        else:
            yield Success(each.series.symbol, finished, 0.0)
    for event in engine.run(left, on_epoch):
        yield _stored(event, registry, alias) if isinstance(event, Success) else event


def _stored(event: Success, registry: ModelRegistry, alias: str | None) -> Event:
    try:
        outcome = _store(event.symbol, event.result, registry, event.seconds, alias)
    except MambakitError as error:
        return Failure(event.symbol, reason_of(error), event.seconds)
    return Success(event.symbol, outcome, event.seconds)


def train_and_store(
    prepared: PreparedSeries,
    training: TrainingConfig,
    registry: ModelRegistry,
    *,
    resume: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
    alias: str | None = PRODUCTION,
) -> Outcome:
    """Train one symbol and store it as the next version, which becomes production or what `alias` says.

    With `resume`, a killed training goes on from its last checkpoint, and a symbol that the killed run had already
    stored, from the same settings and data, is taken over as it is.
    """
    symbol = prepared.series.symbol
    if resume and not decided_by_first(lambda: registry.interrupted(symbol)):
        finished = _finished(prepared, training, registry)
        if finished is not None:
            return finished
    with held_by_first(lambda: registry.run_folder(symbol)) as run_dir:
        started = time.perf_counter()
        try:
            trained = train_prepared(
                prepared,
                training,
                run_dir=run_dir,
                resume=resume,
                quiet=quiet,
                on_epoch=on_epoch,
                tracking=tracking,
            )
        except TrainingDiverged:
            if is_first():
                remove_folder(run_dir / "checkpoints")  # resuming would only diverge again
            raise
        return _store(symbol, trained, registry, time.perf_counter() - started, alias)


def _store(
    symbol: str, trained: TrainedForecaster, registry: ModelRegistry, seconds: float, alias: str | None
) -> Outcome:
    """Store what took so many seconds to train and judge."""
    started = time.perf_counter()
    version = decided_by_first(
        lambda: registry.store(symbol, lambda folder, name: save_forecaster(folder, trained, name), alias)
    )
    storing = time.perf_counter() - started
    judging = trained.judging_seconds
    return Outcome(symbol, version, trained.evaluation, False, seconds - judging, storing, trained.record, judging)


def _finished(prepared: PreparedSeries, training: TrainingConfig, registry: ModelRegistry) -> Outcome | None:
    """The newest stored version, if it was trained with these settings on these prices."""
    saved = _same_training(prepared, training, registry)
    if saved is None:
        return None
    record = read_json(registry.find(saved.symbol, saved.version) / "metrics.json")["training"]
    return Outcome(saved.symbol, saved.version, saved.evaluation, True, 0.0, 0.0, TrainingRecord.model_validate(record))


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
        and saved.metadata["data_stats"].get("covariates_sha256") == prepared.covariates_fingerprint
    )
    return saved if same else None
