"""One model over many symbols: their days teach one network, which also forecasts symbols that it has not met.

What a symbol has for itself is little: its drift, and a vector that is added to each of its days. Number 0 is a symbol
that the model has not met; in training each symbol is now and then taken for it, so that it stands for any.

The parts are cut by the calendar, on the same days for all symbols: prices move together, so a day that one symbol is
judged on must not have taught the model through another.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.forecast.artefact import software, write_model
from mambakit.forecast.config import SPLIT, MambaConfig, pooled_training
from mambakit.forecast.dataset import PreparedSeries, column_names, prepare_series, raw_features
from mambakit.forecast.evaluation import Evaluation, evaluate
from mambakit.forecast.model import MambaModel
from mambakit.forecast.outofsample import OutOfSample
from mambakit.forecast.pool_registry import POOLED, pooled_registry
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.samples import Batch, SequenceData, WindowData
from mambakit.forecast.train import objective, one_thread, out_of_sample, shrink
from mambakit.forecast.windows import FeatureScaler, Split
from mambakit.training import TrainingConfig, TrainingRecord, fit
from mambakit.training.artefacts import write_json
from mambakit.training.processes import decided_by_first, held_by_first
from mambakit.training.record import EpochEntry
from mambakit.training.tracking import Tracking

# How often a symbol is taken for one that the model has not met.
_FORGOTTEN = 0.25


@dataclass(frozen=True)
class TrainedPool:
    """A pooled network, how it came about, and how it did on each symbol's test part."""

    prepared: tuple[PreparedSeries, ...]  # in the order of the symbols' numbers, from 1
    model: MambaModel
    training: TrainingConfig
    record: TrainingRecord
    evaluations: dict[str, Evaluation]
    tests: dict[str, OutOfSample]  # by symbol
    judging_seconds: float = 0.0

    @property
    def symbols(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        return tuple(each.series.symbol for each in self.prepared)


def prepare_pooled(
    series: Sequence[PriceSeries],
    config: MambaConfig,
    *,
    covariates: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> list[PreparedSeries]:
    """Prepare every series, with parts that end on the same days and one scaler for all.

    Args:
        covariates: those of each series, (days,) each, by its symbol and their names.

    Raises DataError where a series can't be used, has no days in one of the parts, or comes twice.
    """
    if len({each.symbol for each in series}) < len(series):
        raise DataError("every symbol of a pooled model may come once")
    if not series:
        raise DataError("a pooled model needs at least one series")
    own = {} if covariates is None else covariates
    alone = [
        prepare_series(each, config, covariates=own.get(each.symbol))
        for each in sorted(series, key=lambda each: each.symbol)
    ]
    days = np.sort(np.concatenate([each.series.dates[each.origins] for each in alone]))
    validation, test = (days[int(len(days) * share)] for share in (SPLIT[0], SPLIT[0] + SPLIT[1]))
    return with_common_scaler(
        [
            prepare_series(each.series, config, split=_split_at(each, validation, test), covariates=each.covariates)
            for each in alone
        ]
    )


def prepare_unmet(
    series: PriceSeries, pool: Sequence[PreparedSeries], *, covariates: Mapping[str, np.ndarray] | None = None
) -> PreparedSeries:
    """Prepare a series that a pooled model has not met, with the scaler of its pool, and parts that end with theirs."""
    config = pool[0].config
    first = [
        min(each.series.dates[each.origins[getattr(each.split, part)[0]]] for each in pool)
        for part in ("validation", "test")
    ]
    alone = prepare_series(series, config, covariates=covariates)
    prepared = prepare_series(series, config, split=_split_at(alone, *first), covariates=covariates)
    raw = raw_features(series, config, covariates)
    return replace(prepared, scaler=pool[0].scaler, features=pool[0].scaler.transform(raw))


def with_common_scaler(common: Sequence[PreparedSeries]) -> list[PreparedSeries]:
    """The same series, all standardised by what is learnt from of any of them."""
    config = common[0].config
    rows, raw = [], []
    for each in common:
        values = raw_features(each.series, config, each.covariates)
        raw.append(values)
        rows.append(values[each.first_row : each.origins[each.split.training[-1]] + 1])
    scaler = FeatureScaler.fit(np.concatenate(rows), column_names(config))
    return [
        replace(each, scaler=scaler, features=scaler.transform(values))
        for each, values in zip(common, raw, strict=True)
    ]


def train_pooled(
    prepared: Sequence[PreparedSeries],
    training: TrainingConfig | None = None,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
) -> TrainedPool:
    """Train one network on what `prepare_pooled` made of many series, and judge it on each; see `train_prepared`."""
    settings = pooled_training(prepared[0].config.training_mode) if training is None else training
    for each in prepared:
        if not len(each.split.test):
            raise DataError(f"{each.series.symbol}: the split has no test part to judge by")
    with one_thread():
        model, record = train_pooled_network(
            prepared, settings, run_dir=run_dir, resume=resume, quiet=quiet, on_epoch=on_epoch, tracking=tracking
        )
        started = time.perf_counter()
        tests = {
            each.series.symbol: out_of_sample(each, each.split.test, model, symbol=number)
            for number, each in enumerate(prepared, start=1)
        }
        evaluations = {symbol: evaluate(test) for symbol, test in tests.items()}
    seconds = time.perf_counter() - started
    return TrainedPool(tuple(prepared), model, settings, record, evaluations, tests, seconds)


def train_pooled_network(
    prepared: Sequence[PreparedSeries],
    settings: TrainingConfig,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
) -> tuple[MambaModel, TrainingRecord]:
    """Train and shrink, without a look at the test parts."""
    with one_thread():
        model = untrained_pool(prepared, settings.seed)
        validation = _validation_data(prepared)
        record = fit(
            model,
            pooled_objective,
            _training_data(prepared),
            validation,
            settings,
            run_dir=run_dir,
            resume=resume,
            quiet=quiet,
            description=f"{len(prepared)} symbols",
            on_epoch=on_epoch,
            tracking=tracking,
        )
        model.cpu()
        returns = torch.cat([each.at_origins(each.split.validation)["returns"] for each in prepared])
        days = np.concatenate([each.series.dates[each.origins[each.split.validation]] for each in prepared])
        shrink(model, validation, returns, days)
    return model, record


def untrained_pool(prepared: Sequence[PreparedSeries], seed: int) -> MambaModel:
    """A network that forecasts each symbol's drift, and the quantiles of all, scaled by the volatility ahead."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MambaModel(prepared[0].config, prepared[0].features.shape[1], len(prepared))
    known = [each.at_origins(each.split.training) for each in prepared]
    symbol = torch.cat([torch.full((len(each["volatility"]),), number) for number, each in enumerate(known, start=1)])
    model.start_from(**{name: torch.cat([each[name] for each in known]) for name in known[0]}, symbol=symbol)
    return model


def pooled_objective(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of a single symbol, with some symbols forgotten while training."""
    if model.training:
        forgotten = torch.rand(batch["symbol"].shape, device=batch["symbol"].device) < _FORGOTTEN
        batch = batch | {"symbol": batch["symbol"].masked_fill(forgotten, 0)}
    return objective(model, batch)


def train_and_store_pooled(
    prepared: Sequence[PreparedSeries],
    training: TrainingConfig | None,
    root: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    tracking: Tracking | None = None,
) -> "StoredPool":
    """Train a pooled model and store it below a root folder of models as the next version, now in production."""
    registry = pooled_registry(root)
    registry.require_writable(POOLED)
    with held_by_first(lambda: registry.run_folder(POOLED)) as run_dir:
        trained = train_pooled(prepared, training, run_dir=run_dir, resume=resume, quiet=quiet, tracking=tracking)
        started = time.perf_counter()
        version = decided_by_first(
            lambda: registry.store(POOLED, lambda folder, name: save_pooled(folder, trained, name))
        )
    return StoredPool(registry.folder(POOLED) / version, trained, time.perf_counter() - started)


@dataclass(frozen=True)
class StoredPool:
    """A pooled model and where it was stored."""

    folder: Path
    trained: TrainedPool
    storing_seconds: float


def save_pooled(folder: Path, trained: TrainedPool, version: str) -> None:
    """Fill a folder with everything about a pooled model."""
    metadata = describe_pooled(trained, version)
    write_model(folder, trained.model, trained.prepared[0].scaler)
    first = trained.evaluations[trained.symbols[0]]
    metrics = {
        "test": first.to_json(),
        "tests": {symbol: evaluation.to_json() for symbol, evaluation in trained.evaluations.items()},
        "training": trained.record.model_dump(mode="json"),
    }
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "metadata.json", metadata)
    (folder / "README.md").write_text(_card(trained, metadata), encoding="utf-8")


def describe_pooled(trained: TrainedPool, version: str) -> dict[str, Any]:
    """What a later reader needs to know, as `mambakit.forecast.artefact.describe` says it of a single symbol."""
    record = trained.record
    return {
        "symbol": POOLED,
        "symbols": list(trained.symbols),
        "version": version,
        "training_date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_config": trained.model.config.model_dump(mode="json"),
        "training_config": trained.training.model_dump(mode="json"),
        "performance_metrics": {
            "best_val_loss": record.best_validation_loss,
            "best_epoch": record.best_epoch,
            "total_epochs": record.history[-1]["epoch"],
            "parameters": record.parameters,
            "seconds": record.seconds,
            "mean_shrinkage": trained.model.shrinkage.tolist(),
            "width_shrinkage": trained.model.width_shrinkage.tolist(),
        },
        "data_stats": {
            each.series.symbol: {
                "days": len(each.series),
                "first_day": str(each.series.dates[0]),
                "last_day": str(each.series.dates[-1]),
                "sha256": each.series.fingerprint,
                "first_test_origin": str(each.series.dates[each.origins[each.split.test[0]]]),
            }
            for each in trained.prepared
        },
        "software": software(),
    }


def _card(trained: TrainedPool, metadata: dict[str, Any]) -> str:
    from mambakit.forecast.report import skill_line

    lines = "\n".join(f"- {skill_line(evaluation)}" for evaluation in trained.evaluations.values())
    rows = "\n".join(
        f"| {symbol} | {data['first_day']} | {data['last_day']} | {data['days']} | {data['first_test_origin']} |"
        for symbol, data in metadata["data_stats"].items()
    )
    horizons = ", ".join(str(horizon) for horizon in trained.model.config.prediction_horizons)
    return f"""# A pooled model of {len(trained.symbols)} symbols, {metadata["version"]}

One forecaster of the log returns over {horizons} trading days of the symbols below, and of others that it has not met.
Trained {metadata["training_date"]} with mambakit {metadata["software"]["mambakit"]}. The parts end on the same days for
all symbols.

| symbol | first day | last day | days | judged from |
|---|---|---|---|---|
{rows}

## Test part

{lines}

Every score is in `metrics.json`. Past data cannot tell of events unlike any in it. This is no investment advice.
"""


def _split_at(prepared: PreparedSeries, validation: np.datetime64, test: np.datetime64) -> Split:
    """The samples before, between and after two days, purged."""
    origins, dates = prepared.origins, prepared.series.dates
    # A series may end before the horizon of its last origins would; their targets are known all the same.
    reach = dates[origins + prepared.config.longest_horizon]
    samples = np.arange(len(origins))
    parts = {
        "training": samples[reach < validation],
        "validation": samples[(dates[origins] >= validation) & (reach < test)],
        "test": samples[dates[origins] >= test],
    }
    for name, part in parts.items():
        if not len(part):
            raise DataError(
                f"{prepared.series.symbol}: {dates[0]} to {dates[-1]} leaves no day for the {name} part, which all "
                f"symbols share (validation from {validation}, test from {test}); leave this symbol out"
            )
    return Split(parts["training"], parts["validation"], parts["test"])


def _training_data(prepared: Sequence[PreparedSeries]) -> SequenceData | WindowData:
    if prepared[0].config.training_mode == "windows":
        return _windows([(each, each.split.training) for each in prepared])
    runs = []
    for number, each in enumerate(prepared, start=1):
        part = each.training_part()
        assert isinstance(part, SequenceData)
        runs += [replace(run, symbol=number) for run in part.sequences]
    return SequenceData(runs)


def _validation_data(prepared: Sequence[PreparedSeries]) -> SequenceData | WindowData:
    if prepared[0].config.training_mode == "windows":
        return _windows([(each, each.split.validation) for each in prepared])
    return SequenceData(
        [
            each.days(each.first_row, each.origins[each.split.validation], number)
            for number, each in enumerate(prepared, start=1)
        ]
    )


def _windows(parts: Sequence[tuple[PreparedSeries, np.ndarray]]) -> WindowData:
    """Windows of several series as if these stood one behind the other; no window reaches from one into the next."""
    offsets = np.cumsum([0, *(len(each.series) for each, _ in parts)])
    return WindowData(
        np.concatenate([each.features for each, _ in parts]),
        np.concatenate([each.volatility for each, _ in parts]),
        np.concatenate([each.terms for each, _ in parts]),
        np.concatenate([each.returns[samples] for each, samples in parts]),
        np.concatenate(
            [each.origins[samples] + offset for (each, samples), offset in zip(parts, offsets[:-1], strict=True)]
        ),
        parts[0][0].config.sequence_length,
        np.concatenate([np.full(len(samples), number) for number, (_, samples) in enumerate(parts, start=1)]),
    )
