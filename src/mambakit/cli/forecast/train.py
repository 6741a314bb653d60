"""`mambakit forecast train`: a model for each symbol, or one for all, judged on days that it has not seen."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambakit.cli.console import console
from mambakit.cli.forecast.options import (
    SYMBOLS_HELP,
    BatchSize,
    Days,
    DModel,
    Epochs,
    Layers,
    LearningRate,
    Mixer,
    Mode,
    Patience,
    Preset,
    Quiet,
    Seed,
    SettingsFile,
    Source,
    parsed_symbols,
    plain_warnings,
    settings,
)

if TYPE_CHECKING:
    from mambakit.forecast.config import MambaConfig
    from mambakit.forecast.dataset import PreparedSeries
    from mambakit.forecast.engines import Engine, Event, Failure
    from mambakit.forecast.evaluation import Evaluation
    from mambakit.forecast.prices import PriceSeries
    from mambakit.forecast.registry import ModelRegistry
    from mambakit.forecast.workflow import Outcome
    from mambakit.training import TrainingConfig
    from mambakit.training.tracking import Tracking

TEST_SYMBOLS = ("AAPL", "MSFT", "GOOGL")
_TABLES = 6  # symbols that get a table each; of more, a line each

EXAMPLES = """
Three symbols, all defaults:

  mambakit forecast train --test

Symbols of your choice, more briefly:

  mambakit forecast train --symbols AAPL,IBM --epochs 20 --out models

Prices of your own, in files such as AAPL.csv:

  mambakit forecast train --symbols AAPL,MSFT --source my/prices

One model over many symbols, which also forecasts others:

  mambakit forecast train --pooled --symbols AAPL,IBM,MSFT

Another kind of block, by windows instead of whole sequences:

  mambakit forecast train --test --mixer mamba2 --mode windows

Fifty symbols on a Ray cluster:

  mambakit forecast train --symbols TIER_1 --source yahoo --engine ray --ray-address auto

Go on with a training that was killed:

  mambakit forecast train --test --resume
"""


def train(
    test: Annotated[bool, typer.Option("--test", help=f"Train {', '.join(TEST_SYMBOLS)}.")] = False,
    symbols: Annotated[str | None, typer.Option(help=SYMBOLS_HELP)] = None,
    source: Source = "builtin",
    days: Days = None,
    out: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("models"),
    pooled: Annotated[bool, typer.Option("--pooled", help="Train one model over all of the symbols.")] = False,
    preset: Preset = "default",
    settings_file: SettingsFile = None,
    mixer: Mixer = None,
    mode: Mode = None,
    d_model: DModel = None,
    layers: Layers = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    schedule: Annotated[str | None, typer.Option(help="Learning rate: cosine, constant or plateau.")] = None,
    patience: Patience = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Parts that a batch is cut into where memory is short.")
    ] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient; 0: not clipped.")] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16, or on a GPU fp16.")] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Symbols trained at once; as many as there are cores by default.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: on a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as host:6379, or local to start one here.")
    ] = None,
    tracker: Annotated[str | None, typer.Option(help="Also send losses to tensorboard, mlflow or wandb.")] = None,
    tracker_dir: Annotated[Path | None, typer.Option(help="Folder for that; OUT/tracker_runs by default.")] = None,
    store_as: Annotated[
        str, typer.Option(help="What the version becomes: production, challenger or neither.")
    ] = "production",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was killed.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model for each symbol, and judge it on days that it has not seen.

    Prints each symbol's model beside the forecasters to beat, at every horizon, and says whether it beat them.

    Stores each model as OUT/SYMBOL/v1, v2 and so on, with its figures and a model card. A symbol that fails stops no
    other; it is named in the end, and the exit status is 1.
    """
    if test == (symbols is not None):
        raise typer.BadParameter("give either --test or --symbols AAPL,MSFT", param_hint="--symbols")
    if store_as not in ("production", "challenger", "neither"):
        raise typer.BadParameter(f"expected production, challenger or neither, got {store_as}", param_hint="--store-as")
    if tracker_dir is not None and tracker is None:
        raise typer.BadParameter("needs --tracker, whose folder it is", param_hint="--tracker-dir")
    started = time.perf_counter()
    asked = TEST_SYMBOLS if symbols is None else parsed_symbols(symbols)
    config, training = settings(
        preset,
        {"d_model": d_model, "num_layers": layers, "mixer": mixer, "training_mode": mode},
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "patience": patience,
            "gradient_accumulation": accumulate,
            "clip_norm": clip_norm,
            "mixed_precision": precision,
            "seed": seed,
        },
        file=settings_file,
        pooled=pooled,
    )
    _refuse_what_does_not_go_together(engine, parallel, ray_address, tracker, pooled, store_as)
    from mambakit.training.processes import is_first

    if not is_first():  # of the processes of `accelerate launch`
        quiet = True
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    from mambakit.errors import DataError, MambakitError
    from mambakit.forecast.engines import Failure, Success
    from mambakit.forecast.prices import fetch_historical_prices
    from mambakit.forecast.registry import ModelRegistry
    from mambakit.forecast.sources import open_source
    from mambakit.forecast.workflow import prepare_all
    from mambakit.training.tracking import Tracking

    def tracking(run: str) -> Tracking | None:
        folder = out / "tracker_runs" if tracker_dir is None else tracker_dir  # no symbol has an underscore
        return None if tracker is None else Tracking(tracker, folder, run)  # type: ignore[arg-type]

    tracking("")  # a tool that is missing is found before any work
    registry = ModelRegistry(out)
    if source != "builtin" and not quiet:
        print(f"Reading {len(asked)} symbols from {source}", flush=True)
    with plain_warnings():
        series = list(fetch_historical_prices(asked, days, source=open_source(source, progress=not quiet)).values())
        if not quiet:
            for each in series:
                print(_data_line(each, days))
        if pooled:
            _train_pooled(
                series, config, training, out, tracking("POOLED"), resume=resume, quiet=quiet, started=started
            )
            return
        prepared, failures = prepare_all(series, config, registry)
    preparing = time.perf_counter() - started
    if not prepared:
        raise DataError("; ".join(failure.reason for failure in failures))
    runner = _engine(engine, parallel, ray_address, len(prepared), quiet)
    alias = None if store_as == "neither" else store_as
    events = _train_all(prepared, training, registry, runner, alias, tracking, resume=resume, quiet=quiet)
    outcomes = _in_order_of([event.result for event in events if isinstance(event, Success)], asked)
    failures += [event for event in events if isinstance(event, Failure)]
    if not outcomes:
        raise MambakitError("; ".join(failure.reason for failure in failures))
    _print_outcomes(outcomes, registry, quiet)
    if not quiet:
        _print_hints(outcomes, registry, config, training)
    elapsed = time.perf_counter() - started
    print(
        f"Time: {elapsed:.1f} s; imports and data {preparing:.1f} s, and over all symbols: "
        f"training {sum(outcome.training_seconds for outcome in outcomes):.1f} s, "
        f"judging {sum(outcome.judging_seconds for outcome in outcomes):.1f} s, "
        f"figures and files {sum(outcome.storing_seconds for outcome in outcomes):.1f} s"
    )
    if failures:
        _print_failures(outcomes, failures)
        raise typer.Exit(1)


def _refuse_what_does_not_go_together(
    engine: str, parallel: int | None, ray_address: str | None, tracker: str | None, pooled: bool, store_as: str
) -> None:
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"expected local or ray, got {engine}", param_hint="--engine")
    if engine == "local" and ray_address is not None:
        raise typer.BadParameter("needs --engine ray", param_hint="--ray-address")
    if engine == "ray" and parallel is not None:
        raise typer.BadParameter("the cluster decides how many run at once", param_hint="--parallel")
    if engine == "ray" and tracker is not None:
        raise typer.BadParameter("writes on this machine, where --engine ray trains nothing", param_hint="--tracker")
    if pooled and (engine == "ray" or parallel is not None):
        option = "--engine" if engine == "ray" else "--parallel"
        raise typer.BadParameter("a pooled model is a single training; leave it out", param_hint=option)
    if pooled and store_as != "production":
        raise typer.BadParameter("a pooled model always becomes production; leave it out", param_hint="--store-as")


def _engine(name: str, parallel: int | None, ray_address: str | None, jobs: int, quiet: bool) -> "Engine":
    from mambakit.forecast.engines import HereEngine, ProcessEngine, default_processes
    from mambakit.training.processes import processes

    if name == "ray":
        from mambakit.forecast.ray_engine import RayEngine

        return RayEngine(ray_address)
    together = processes() > 1  # each symbol is trained by all processes of `accelerate launch`
    at_once = 1 if together else min(jobs, default_processes(jobs) if parallel is None else parallel)
    return ProcessEngine(at_once) if at_once > 1 else HereEngine(quiet)


def _train_all(
    prepared: "list[PreparedSeries]",
    training: "TrainingConfig",
    registry: "ModelRegistry",
    engine: "Engine",
    alias: str | None,
    tracking: "Callable[[str], Tracking | None]",
    *,
    resume: bool,
    quiet: bool,
) -> "list[Event]":
    """What became of each symbol; shown while it goes on."""
    from mambakit.forecast.engines import HereEngine
    from mambakit.forecast.progress import SymbolsProgress
    from mambakit.forecast.workflow import train_all

    events: list[Event] = []
    # A single symbol, or one after the other, shows its own epochs.
    with SymbolsProgress(len(prepared), training.epochs, quiet or isinstance(engine, HereEngine)) as progress:
        for event in train_all(
            prepared,
            training,
            registry,
            engine,
            resume=resume,
            on_epoch=progress.epoch,
            tracking=tracking,
            alias=alias,
        ):
            progress.ended(event)
            events.append(event)
    return events


def _in_order_of(outcomes: "list[Outcome]", symbols: Sequence[str]) -> "list[Outcome]":
    return sorted(outcomes, key=lambda outcome: list(symbols).index(outcome.symbol))


def _print_outcomes(outcomes: "list[Outcome]", registry: "ModelRegistry", quiet: bool) -> None:
    from mambakit.forecast.report import skill_line

    evaluations = [outcome.evaluation for outcome in outcomes]
    _print_evaluations(evaluations, quiet)
    for outcome in outcomes:
        state = "already trained, kept" if outcome.reused else "stored"
        print(f"{skill_line(outcome.evaluation)}; {state} as {registry.folder(outcome.symbol) / outcome.version}")
    _print_verdicts(evaluations)


def _train_pooled(
    series: "list[PriceSeries]",
    config: "MambaConfig",
    training: "TrainingConfig",
    out: Path,
    tracking: "Tracking | None",
    *,
    resume: bool,
    quiet: bool,
    started: float,
) -> None:
    from mambakit.forecast.pooled import prepare_pooled, train_and_store_pooled
    from mambakit.forecast.report import skill_line

    prepared = prepare_pooled(series, config)
    preparing = time.perf_counter() - started
    stored = train_and_store_pooled(prepared, training, out, resume=resume, quiet=quiet, tracking=tracking)
    evaluations = list(stored.trained.evaluations.values())
    _print_evaluations(evaluations, quiet)
    for evaluation in evaluations:
        print(skill_line(evaluation))
    print(f"One model of {len(evaluations)} symbols, stored as {stored.folder}")
    _print_verdicts(evaluations)
    print(
        f"Time: imports and data {preparing:.1f} s, training {stored.trained.record.seconds:.1f} s, "
        f"judging {stored.trained.judging_seconds:.1f} s, figures and files {stored.storing_seconds:.1f} s"
    )


def _print_evaluations(evaluations: "list[Evaluation]", quiet: bool) -> None:
    from mambakit.forecast.report import evaluation_table, legend

    if len(evaluations) > _TABLES:
        return
    terminal = console()
    for evaluation in evaluations:
        terminal.print(evaluation_table(evaluation))
    if not quiet:
        terminal.print(legend(), soft_wrap=not terminal.is_terminal)


def _print_verdicts(evaluations: "list[Evaluation]") -> None:
    from mambakit.forecast.report import distribution_verdict, verdict

    print(verdict(evaluations))
    print(distribution_verdict(evaluations))


def _print_hints(
    outcomes: "list[Outcome]", registry: "ModelRegistry", config: "MambaConfig", training: "TrainingConfig"
) -> None:
    """What may help, where training was slow or had no success."""
    from mambakit.forecast.troubleshooting import SLOW_SECONDS, poor_prediction_hints, slow_training_hints
    from mambakit.training.artefacts import read_json

    metadata = [read_json(registry.folder(each.symbol) / each.version / "metadata.json") for each in outcomes]
    hints = poor_prediction_hints([outcome.evaluation for outcome in outcomes], metadata)
    if any(outcome.training_seconds > SLOW_SECONDS for outcome in outcomes):
        hints += [f"speed: {hint}" for hint in slow_training_hints(config, training)]
    for hint in hints:
        print(f"What may help: {hint}")


def _print_failures(outcomes: "list[Outcome]", failures: "list[Failure]") -> None:
    """The closing table of a run in which something failed: every symbol, trained or not."""
    from rich.table import Table

    table = Table("symbol", "outcome", "version", "why", title="What became of each symbol")
    for outcome in outcomes:
        table.add_row(outcome.symbol, "kept" if outcome.reused else "trained", outcome.version, "")
    for failure in failures:
        table.add_row(failure.symbol, "failed", "", failure.reason.removeprefix(f"{failure.symbol}: "))
    console().print(table)
    names = ", ".join(failure.symbol for failure in failures)
    print(
        f"mambakit: error: {len(failures)} of {len(outcomes) + len(failures)} symbols failed: {names}", file=sys.stderr
    )


def _data_line(series: "PriceSeries", asked: int | None) -> str:
    fewer = f" (fewer than the {asked} asked for)" if asked is not None and len(series) < asked else ""
    return f"{series.symbol}: {len(series)} days{fewer}, {series.dates[0]} to {series.dates[-1]}"
