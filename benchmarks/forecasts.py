"""Is the forecaster as good as it must be? Every symbol is trained and judged, and each criterion gets PASS or FAIL.

    python -m benchmarks.forecasts                                   all symbols, the split of `mambakit forecast train`
    python -m benchmarks.forecasts --symbols AAPL,JNJ-SKF --epochs 5
    python -m benchmarks.forecasts --folds 5 --step 60 --workers 16  a walk-forward backtest instead
    python -m benchmarks.forecasts --json FILE --save FOLDER         every figure; every prediction

The symbols are the built-in ones and, where skfolio is installed, its 20 American shares from 1990 to 2022 (AAPL-SKF
is skfolio's AAPL). Each symbol is one process with one torch thread, so the figures do not depend on `--workers`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.prices import all_names, read_series, skfolio_names
from mambakit.errors import MambakitError
from mambakit.forecast.backtest import Backtest, SymbolBacktest, WalkForward, backtest_symbol, collect, walk_forward
from mambakit.forecast.baselines import ALL_BASELINES, BASELINES
from mambakit.forecast.config import SEQUENCE_TRAINING, SPLIT, MambaConfig
from mambakit.forecast.conformal import adaptive_predictions
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.evaluation import MODEL, UNCALIBRATED, evaluate
from mambakit.forecast.report import distribution_verdict, skill_line, verdict
from mambakit.forecast.summary import ALL_HORIZONS, Summary, success_criteria, summarise
from mambakit.forecast.tables import criteria_lines, horizon_name, skill_verdict, summary_tables
from mambakit.forecast.windows import temporal_split
from mambakit.training import TrainingConfig


def judge_symbol(
    symbol: str, config: MambaConfig, training: TrainingConfig, plan: WalkForward | None, baselines: Sequence[str]
) -> SymbolBacktest:
    """Train, forecast and judge one symbol, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    series = read_series(symbol)
    origins = prepare_series(series, config).origins
    longest = config.longest_horizon
    splits = [temporal_split(origins, longest, SPLIT)] if plan is None else list(walk_forward(origins, longest, plan))
    return backtest_symbol(series, config, training, splits, baselines=baselines, calibration="conformal")


def run_all(symbols: Sequence[str], options: argparse.Namespace, say: Console) -> Backtest:
    """Judge every symbol in parallel processes; one that fails does not stop the others."""
    config = MambaConfig(d_model=options.d_model, num_layers=options.layers)
    training = SEQUENCE_TRAINING.model_copy(update={"epochs": options.epochs, "seed": options.seed})
    plan = WalkForward(folds=options.folds, step=options.step) if options.folds else None
    baselines = BASELINES if options.quick else ALL_BASELINES
    done: dict[str, SymbolBacktest] = {}
    failures: dict[str, str] = {}
    started = time.perf_counter()
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(judge_symbol, each, config, training, plan, baselines): each for each in symbols}
        for finished in as_completed(waiting):
            symbol = waiting[finished]
            try:
                done[symbol] = finished.result()
                outcome = skill_line(done[symbol].evaluation)
            except MambakitError as error:
                failures[symbol] = str(error)
                outcome = f"{symbol} failed: {error}"
            minutes = (time.perf_counter() - started) / 60
            say.print(f"[{len(done) + len(failures)}/{len(symbols)}, {minutes:.1f} min] {outcome}", markup=False)
    settings = {
        "model": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "walk_forward": None if plan is None else plan.model_dump(mode="json"),
        "baselines": list(baselines),
        "calibration": "conformal",
    }
    return collect([done[symbol] for symbol in symbols if symbol in done], settings, failures)


def calibrations(result: Backtest) -> dict[str, Summary]:
    """The summary under each way of calibrating the same networks."""
    variants = {
        "none": [each.with_predictions(MODEL, each.predictions[UNCALIBRATED]) for each in result.records],
        "adaptive": [each.with_predictions(MODEL, adaptive_predictions(each, UNCALIBRATED)) for each in result.records],
        "conformal, then adaptive": [
            each.with_predictions(MODEL, adaptive_predictions(each, MODEL)) for each in result.records
        ],
    }
    summaries = {name: summarise(records, [evaluate(each) for each in records]) for name, records in variants.items()}
    return {"none": summaries["none"], "conformal": result.summary, **summaries}


def calibration_table(summaries: dict[str, Summary]) -> Table:
    """CRPS and coverage of each."""
    horizons = (*next(iter(summaries.values())).horizons, ALL_HORIZONS)
    table = Table(title="The same networks, calibrated in other ways", title_justify="left")
    for column in (
        "calibration",
        "CRPS / random walk",
        "CRPS / ewma walk",
        *(f"80% {horizon_name(h)}" for h in horizons),
    ):
        table.add_column(column, no_wrap=True)
    for name, summary in summaries.items():
        ratios = {each.name: each.value for each in summary.crps if each.horizon == ALL_HORIZONS}
        cover = [f"{each.value:.1%}" for each in summary.coverage if each.name == "80%"]
        table.add_row(name, f"{ratios['random walk']:.4f}", f"{ratios['ewma walk']:.4f}", *cover)
    return table


def main() -> None:
    """Run, print, and leave with status 1 where a criterion is not met."""
    options = _options()
    say = Console(stderr=True, highlight=False)
    out = Console(width=None if Console().is_terminal else 140, highlight=False, markup=False)
    if not skfolio_names():
        out.print("skfolio is not installed: its 20 symbols are left out (pip install skfolio)")
    symbols = options.symbols.split(",") if options.symbols else all_names()
    unknown = [symbol for symbol in symbols if symbol not in all_names()]
    if unknown:
        sys.exit(f"no prices of {', '.join(unknown)}; there are {', '.join(all_names())}")
    result = run_all(symbols, options, say)
    for table in summary_tables(result.summary):
        out.print(table)
    summaries = calibrations(result)
    out.print(calibration_table(summaries))
    for note in dict.fromkeys(note for evaluation in result.evaluations for note in evaluation.notes):
        out.print(note)
    for symbol, reason in result.failures.items():
        out.print(f"{symbol} failed: {reason}")
    out.print(verdict(result.evaluations), soft_wrap=True)
    out.print(distribution_verdict(result.evaluations), soft_wrap=True)
    out.print(skill_verdict(result.summary), soft_wrap=True)
    criteria = success_criteria(result.summary)
    for line in criteria_lines(criteria):
        out.print(line, soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(_record(result, summaries, criteria), indent=1) + "\n")
    if options.save:
        result.save(options.save)
    if result.failures or not all(each.passed for each in criteria):
        sys.exit(1)


def _record(result: Backtest, summaries: dict[str, Summary], criteria: Sequence[Any]) -> dict[str, Any]:
    return {
        "machine": machine.describe(),
        "settings": result.settings,
        "criteria": [{"name": each.name, "passed": each.passed, "detail": each.detail} for each in criteria],
        "summaries": {name: each.to_json() for name, each in summaries.items()},
        "evaluations": [each.to_json() for each in result.evaluations],
        "failures": result.failures,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecasts", description=__doc__.split("\n")[0])
    parser.add_argument("--symbols", help="such as AAPL,JNJ-SKF; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--epochs", type=int, default=SEQUENCE_TRAINING.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--d-model", type=int, default=MambaConfig().d_model)
    parser.add_argument("--layers", type=int, default=MambaConfig().num_layers)
    parser.add_argument("--folds", type=int, default=0, help="of a walk-forward backtest; 0: the split of training")
    parser.add_argument("--step", type=int, default=60, help="days of each fold")
    parser.add_argument("--quick", action="store_true", help="without GARCH, ETS, ARIMA and GRU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure to FILE")
    parser.add_argument("--save", metavar="FOLDER", type=Path, help="write every prediction to a new FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
