"""Walk-forward backtest: train on the past, forecast what follows, move on, and judge all forecasts together.

    |--------- training --------| purge |- validation -| purge |- test -|                      fold 1
    |------------- training ------------| purge |- validation -| purge |- test -|              fold 2

The purge drops samples whose target reaches the first origin of the next part; an embargo widens it by some days. For
every fold features are scaled, the network is trained and each baseline is fitted anew, on that fold's training part.
The tests follow one another without a gap, so the forecasts of all folds make one out-of-sample record. Source of the
purge and the embargo: Lopez de Prado, Advances in Financial Machine Learning (2018), chapters 7 and 12.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from mambakit.errors import ArtefactError, DataError, MambakitError
from mambakit.forecast.baselines import ALL_BASELINES, BASELINES, baseline_forecasts, require_known
from mambakit.forecast.config import MambaConfig, default_training
from mambakit.forecast.conformal import adaptive_predictions
from mambakit.forecast.dataset import PreparedSeries, prepare_series
from mambakit.forecast.evaluation import MODEL, UNCALIBRATED, Evaluation, evaluate
from mambakit.forecast.outofsample import OutOfSample, read_records, stacked, write_records
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.summary import Summary, summarise
from mambakit.forecast.train import calibrate, network_predictions, out_of_sample, train_network
from mambakit.forecast.windows import Split
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import read_json, verify_folder, write_folder, write_json

_NEEDED = ("random walk", "drift", "ewma walk", "ewma")  # every score refers to these
_LEAST_TRAINING, _LEAST_VALIDATION = 100, 20  # samples after the purge
_HISTORY_DAYS = 120  # of prices before the first test forecast, for the figures


class WalkForward(BaseModel):
    """How a series is walked through; a value out of bounds raises pydantic.ValidationError naming it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folds: PositiveInt = 5  # test parts, the last of which ends with the series
    step: PositiveInt = 60  # samples, that is trading days, in each test part
    refit_every: PositiveInt = 1  # folds that one fit serves
    window: PositiveInt | None = None  # samples before the test part to learn from; none: all, an expanding window
    validation_share: float = Field(default=0.25, gt=0.0, lt=1.0)  # of those samples, the last ones
    embargo: NonNegativeInt = 0  # days beside the purge


Calibration = Literal["none", "conformal", "adaptive"]


def walk_forward(origins: np.ndarray, longest_horizon: int, plan: WalkForward) -> Iterator[Split]:
    """One split for each fit, oldest first; its test part serves `refit_every` folds.

    Args:
        origins: (samples,) rows of the samples' last days, increasing.
        longest_horizon: days from an origin to its furthest target.

    Raises DataError where the first fit has too few samples to learn from.
    """
    count = len(origins)
    first = count - plan.folds * plan.step
    for start in range(first, count, plan.step * plan.refit_every):
        test = np.arange(start, min(start + plan.step * plan.refit_every, count))
        known = np.arange(max(0 if plan.window is None else start - plan.window, 0), max(start, 0))
        training, validation = np.split(known, [len(known) - round(plan.validation_share * len(known))])
        gap = longest_horizon + plan.embargo
        if len(validation):
            training = training[origins[training] + gap < origins[validation[0]]]
            validation = validation[origins[validation] + gap < origins[test[0]]]
        if len(training) < _LEAST_TRAINING or len(validation) < _LEAST_VALIDATION:
            raise DataError(
                f"{count} samples leave {len(training)} to train on and {len(validation)} to validate on before the "
                f"first of {plan.folds} folds of {plan.step} days, at least {_LEAST_TRAINING} and "
                f"{_LEAST_VALIDATION} are needed: take fewer or shorter folds, or a longer window"
            )
        yield Split(training, validation, test)


@dataclass(frozen=True)
class SymbolBacktest:
    """One symbol's record, what it was made from, and what a reader must know."""

    record: OutOfSample
    evaluation: Evaluation
    data: dict[str, Any]  # days, checksum, the dates of every fold's parts
    prices: dict[str, list]  # dates and prices around the test days, for figures


@dataclass(frozen=True)
class Backtest:
    """A finished backtest: all predictions, their scores, and the settings that made them."""

    records: tuple[OutOfSample, ...]
    evaluations: tuple[Evaluation, ...]
    summary: Summary
    settings: dict[str, Any]
    data: dict[str, Any]
    prices: dict[str, dict[str, list]]
    failures: dict[str, str] = field(default_factory=dict)  # why a symbol could not be backtested

    def save(self, folder: str | Path) -> None:
        """Write predictions.parquet and backtest.json, whole or not at all, with checksums.

        Raises FileExistsError where the folder is there already.
        """
        write_folder(folder, self._fill)

    def _fill(self, folder: Path) -> None:
        write_records(folder / "predictions.parquet", self.records)
        content = {
            "settings": self.settings,
            "summary": self.summary.to_json(),
            "evaluations": [each.to_json() for each in self.evaluations],
            "data": self.data,
            "prices": self.prices,
            "failures": self.failures,
        }
        write_json(folder / "backtest.json", content)

    @classmethod
    def load(cls, folder: str | Path) -> "Backtest":
        """Read a folder that `save` wrote; raises ArtefactError where it is not one, or was changed."""
        folder = Path(folder)
        verify_folder(folder)
        content = read_json(folder / "backtest.json")
        try:
            return cls(
                tuple(read_records(folder / "predictions.parquet")),
                tuple(Evaluation.from_json(each) for each in content["evaluations"]),
                Summary.from_json(content["summary"]),
                content["settings"],
                content["data"],
                content["prices"],
                content["failures"],
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise ArtefactError(f"{folder} is not a backtest that this version of mambakit can read") from error


Progress = Callable[[str, int, int], None]


def backtest(
    series: Iterable[PriceSeries],
    config: MambaConfig,
    training: TrainingConfig | None = None,
    plan: WalkForward | None = None,
    *,
    baselines: Sequence[str] = ALL_BASELINES,
    calibration: Calibration = "conformal",
    on_fit: Progress | None = None,
) -> Backtest:
    """Backtest every series; one that fails is left out, with the reason in `failures`.

    Args:
        training: by default what suits the configuration's mode.
        baselines: beside random walk, drift, ewma walk and ewma, which are always made.
        calibration: of the model's intervals: "conformal" offsets from each fold's validation part, "adaptive" levels
            that learn from each test outcome as it becomes known, or "none".
        on_fit: called with the symbol, the number of the fit from 1, and how many there are, before each fit.

    Raises:
        DataError: a name that is not a baseline's, or every series failed; then the first reason.
    """
    plan = plan or WalkForward()
    training = default_training(config.training_mode) if training is None else training
    require_known(baselines)
    done: list[SymbolBacktest] = []
    failures: dict[str, str] = {}
    for each in series:
        try:
            whole = prepare_series(each, config)
            splits = list(walk_forward(whole.origins, config.longest_horizon, plan))
            done.append(
                backtest_symbol(
                    each, config, training, splits, baselines=baselines, calibration=calibration, on_fit=on_fit
                )
            )
        except MambakitError as error:
            failures[each.symbol] = str(error)
    settings = {
        "walk_forward": plan.model_dump(mode="json"),
        "model": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "baselines": list(baselines),
        "calibration": calibration,
    }
    return collect(done, settings, failures)


def collect(done: Sequence[SymbolBacktest], settings: dict[str, Any], failures: dict[str, str]) -> Backtest:
    """Symbols that were backtested apart, as one; raises DataError where there is none."""
    if not done:
        reasons = "; ".join(f"{symbol}: {reason.removeprefix(f'{symbol}: ')}" for symbol, reason in failures.items())
        raise DataError(f"no symbol could be backtested: {reasons}")
    records = tuple(each.record for each in done)
    evaluations = tuple(each.evaluation for each in done)
    return Backtest(
        records=records,
        evaluations=evaluations,
        summary=summarise(records, evaluations),
        settings=settings,
        data={each.record.symbol: each.data for each in done},
        prices={each.record.symbol: each.prices for each in done},
        failures=failures,
    )


def backtest_symbol(
    series: PriceSeries,
    config: MambaConfig,
    training: TrainingConfig,
    splits: Sequence[Split],
    *,
    baselines: Sequence[str] = BASELINES,
    calibration: Calibration = "conformal",
    on_fit: Progress | None = None,
) -> SymbolBacktest:
    """Fit and forecast one symbol on each split, in order, and judge all test parts together."""
    names = (*_NEEDED, *(name for name in baselines if name not in _NEEDED))
    folds, notes, parts = [], [], []
    for number, split in enumerate(splits):
        if on_fit is not None:
            on_fit(series.symbol, number + 1, len(splits))
        prepared = prepare_series(series, config, split=split)
        model, _ = train_network(prepared, training, calibrated=False, quiet=True)
        made = baseline_forecasts(prepared, split.test, names, training=training)
        notes += [note for note in made.left_out if note not in notes]
        record = out_of_sample(prepared, split.test, model, made.predictions, fold=number)
        raw = record.predictions[MODEL]
        if calibration == "conformal":
            calibrate(model, prepared)
            record = record.with_predictions(MODEL, network_predictions(model, prepared.part(split.test)))
        folds.append(record if calibration == "none" else record.with_predictions(UNCALIBRATED, raw))
        parts.append(_dates(prepared))
    whole = stacked(folds)
    if calibration == "adaptive":
        whole = whole.with_predictions(MODEL, adaptive_predictions(whole, UNCALIBRATED))
    data = {
        "days": len(series),
        "first_day": str(series.dates[0]),
        "last_day": str(series.dates[-1]),
        "sha256": series.fingerprint,
        "folds": parts,
    }
    evaluation = evaluate(whole, tuple(f"{series.symbol}: {note}" for note in notes))
    return SymbolBacktest(whole, evaluation, data, _prices_around(series, whole))


def _dates(prepared: PreparedSeries) -> dict[str, list[str]]:
    days = prepared.series.dates[prepared.origins]
    parts = {name: getattr(prepared.split, name) for name in ("training", "validation", "test")}
    return {name: [str(days[samples[0]]), str(days[samples[-1]])] for name, samples in parts.items()}


def _prices_around(series: PriceSeries, record: OutOfSample) -> dict[str, list]:
    first, last = np.searchsorted(series.dates, record.dates[[0, -1]])
    days = slice(max(int(first) - _HISTORY_DAYS, 0), int(last) + record.horizons[-1] + 1)
    return {"dates": [str(day) for day in series.dates[days]], "prices": series.prices[days].tolist()}
