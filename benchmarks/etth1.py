"""ETTh1 with the standard protocol: `python -m benchmarks.etth1 --data ETTh1.csv`.

Seven channels, hourly; 12 months train, 4 validate, 4 test (Zhou et al. 2021). Values are standardised by the training
part, and every window of the test part counts: older published figures left out the last ones. The published figures
below are of lookback 96 (arXiv 2310.06625, 2403.11144), the ridges are ours. Each seed's figure is of the epoch that
the validation part chose.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.report import WIDTH
from mambakit.errors import DataError, MambakitError
from mambakit.forecast.long_horizon import (
    LONG_HORIZON_TRAINING,
    LongHorizonConfig,
    LongHorizonModel,
    SeriesWindows,
    mean_errors,
    solve_ridge,
    train_long_horizon,
)
from mambakit.training import TrainingConfig

HOURS_A_MONTH = 30 * 24
TRAINING_END, VALIDATION_END, TEST_END = (months * HOURS_A_MONTH for months in (12, 16, 20))
TRAINING, VALIDATION, TEST = (0, TRAINING_END), (TRAINING_END, VALIDATION_END), (VALIDATION_END, TEST_END)
LONG, SHORT = 512, 336  # lookbacks
HORIZONS = (96, 192, 336, 720)
RIDGE, RIDGE_336, HYBRID, MAMBA = f"ridge {LONG}", f"ridge {SHORT}", f"ridge {LONG} + mamba", "mamba alone"
PUBLISHED = {  # test MSE
    "S-Mamba": (0.386, 0.443, 0.489, 0.502),
    "iTransformer": (0.386, 0.441, 0.487, 0.503),
    "PatchTST": (0.414, 0.460, 0.501, 0.500),
    "DLinear": (0.386, 0.437, 0.481, 0.519),
}


@dataclass(frozen=True)
class Run:
    """One model trained for one horizon."""

    kind: str
    horizon: int
    seed: int
    mse: float
    mae: float
    best_epoch: int
    seconds: float


def main() -> None:
    """Train what was asked for, print the table, and write the record."""
    options = _options()
    console = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
    values = read_etth1(options.data)
    runs: list[Run] = []
    for horizon in options.horizons:
        runs += [ridge(values, horizon, lookback) for lookback in (SHORT, LONG)]
        for kind in (HYBRID, MAMBA):
            for seed in range(options.seeds):
                runs.append(train(values, horizon, seed, kind, options.mixer, options.epochs))
                if not options.quiet:
                    run = runs[-1]
                    console.print(
                        f"{kind}, horizon {horizon}, seed {seed}: MSE {run.mse:.4f}, MAE {run.mae:.4f}, "
                        f"epoch {run.best_epoch}, {run.seconds:.0f} s",
                        style="dim",
                    )
    _print_table(console, runs, options.horizons, options.mixer)
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def read_etth1(path: Path) -> np.ndarray:
    """The channels (steps, 7) standardised by the training part; raises DataError for another file."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected ETTh1.csv of github.com/zhouhaoyi/ETDataset ({error})") from error
    if table.shape[1] != 8 or len(table) < TEST_END:
        raise DataError(f"{path}: expected a date, 7 channels and {TEST_END} hours or more, got shape {table.shape}")
    values = table.iloc[:TEST_END, 1:].to_numpy(dtype=np.float64)
    known = values[:TRAINING_END]
    return (values - known.mean(axis=0)) / known.std(axis=0)


def ridge(values: np.ndarray, horizon: int, lookback: int) -> Run:
    """The closed form alone: the hybrid before its first step."""
    start = time.perf_counter()
    config = LongHorizonConfig(lookback=lookback, horizon=horizon)
    model = LongHorizonModel(config)
    known, unseen = (SeriesWindows(values, lookback, horizon, *part) for part in (TRAINING, VALIDATION))
    solve_ridge(model, known, unseen)
    errors = mean_errors(model, SeriesWindows(values, lookback, horizon, *TEST))
    return Run(f"ridge {lookback}", horizon, 0, *errors, 0, time.perf_counter() - start)


def train(values: np.ndarray, horizon: int, seed: int, kind: str, mixer: str, epochs: int | None) -> Run:
    """One seed of one kind."""
    start = time.perf_counter()
    sizes = {"headdim": 16} if mixer in ("mamba2", "mamba3") else {}
    config = LongHorizonConfig(
        lookback=LONG, horizon=horizon, mixer=mixer, mixer_options={"d_state": 16, **sizes}, linear=kind == HYBRID
    )
    chosen: dict[str, float] = {"seed": seed}
    if kind == MAMBA:  # nothing to start from: it learns faster and longer
        chosen |= {"epochs": 10, "learning_rate": 1e-3, "patience": 3}
    if epochs is not None:
        chosen["epochs"] = epochs
    training = TrainingConfig.model_validate({**LONG_HORIZON_TRAINING.model_dump(), **chosen})
    result = train_long_horizon(values, TRAINING_END, VALIDATION_END, config, training, quiet=True)
    errors = mean_errors(result.model, SeriesWindows(values, LONG, horizon, *TEST))
    return Run(kind, horizon, seed, *errors, result.record.best_epoch, time.perf_counter() - start)


def _print_table(console: Console, runs: Sequence[Run], horizons: Sequence[int], mixer: str) -> None:
    table = Table(title=f"ETTh1, test MSE / MAE by horizon (mixer {mixer}; mean over seeds, +- their spread)")
    table.add_column("forecaster")
    for horizon in horizons:
        table.add_column(str(horizon), justify="right")
    goal = {run.horizon: run.mse for run in runs if run.kind == RIDGE_336}
    for kind in (RIDGE_336, RIDGE, HYBRID, MAMBA):
        table.add_row(kind, *(_cell([run for run in runs if (run.kind, run.horizon) == (kind, h)]) for h in horizons))
    for name, figures in PUBLISHED.items():
        table.add_row(name, *(f"{figures[HORIZONS.index(h)]:.3f}" if h in HORIZONS else "" for h in horizons))
    console.print(table)
    for horizon in horizons:
        mean = statistics.mean(run.mse for run in runs if (run.kind, run.horizon) == (HYBRID, horizon))
        verdict = "at or below" if mean <= goal[horizon] else "above"
        console.print(f"horizon {horizon}: {HYBRID} {mean:.4f} is {verdict} {RIDGE_336}'s {goal[horizon]:.4f}")


def _cell(runs: Sequence[Run]) -> str:
    squared, absolute = [run.mse for run in runs], [run.mae for run in runs]
    spread = f" +-{statistics.stdev(squared):.4f}" if len(squared) > 1 else ""
    return f"{statistics.mean(squared):.4f}{spread} / {statistics.mean(absolute):.4f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.etth1", description="ETTh1, standard protocol")
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv of github.com/zhouhaoyi/ETDataset")
    parser.add_argument("--horizons", type=int, nargs="+", default=HORIZONS, help="hours ahead")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mixer", default="mamba2", help="of the Mamba")
    parser.add_argument("--epochs", type=int, help="at most; 5 for the hybrid and 10 for the Mamba alone by default")
    parser.add_argument("--quiet", action="store_true", help="the table alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except MambakitError as error:
        raise SystemExit(f"error: {error}") from error
