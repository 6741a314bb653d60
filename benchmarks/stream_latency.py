"""How long one tick takes, on one core: the whole ensemble, checks and features included, beside reading its weights.

    python -m benchmarks.stream_latency                    # 20,000 ticks each way
    python -m benchmarks.stream_latency --ticks 1000000    # and whether memory stays flat over a million

Each tick is a call of `PredictionModel.predict` with the contest's rows of objects. The floor is a matrix-vector
product of as many weights in the same dtype by the compiled kernels' own loop: nothing but reading them. Weights that
fit in a cache are read from there, as they are between ticks that come one after the other; between ticks that are
far apart they come from memory, so that floor is printed too.
"""

import argparse
import copy
import io
import json
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import machine
from benchmarks.memory import available, status_bytes
from mambakit.nn import EnsembleStepper
from mambakit.stream import Ensemble, PredictionModel, StreamConfig
from mambakit.stream.contest import DataPoint
from mambakit.stream.data import Layout
from mambakit.stream.model import untrained_model
from mambakit.stream.pack import submission
from mambakit.stream.plain.submission import SubmittedModel
from mambakit.stream.ridge import Ridge

INPUTS, STEPS = 32, 1000
LIMIT = 1.5  # of the floor
CONTEST_TICKS, CONTEST_SECONDS = 500_000, 150
_COLD_BYTES = 256 << 20  # more than any cache holds


def make_ensemble(kind: str, features: str, models: int, d_model: int, n_layers: int) -> Ensemble:
    """Untrained: the time of a tick does not depend on what the weights are."""
    config = StreamConfig(kind=kind, features=features, d_model=d_model, n_layers=n_layers)  # type: ignore[arg-type]
    networks = [untrained_model(config, INPUTS, INPUTS, seed).eval() for seed in range(models)]
    names = tuple(map(str, range(INPUTS)))
    ridge = Ridge(np.zeros((1, INPUTS, INPUTS)), np.zeros(INPUTS))
    return Ensemble(config, Layout(names, names, same_row=False), networks, ridge)


def time_ticks(model: Any, ticks: int) -> dict[str, float]:
    """Microseconds of a tick, and bytes by which the process grew after the first tenth."""
    states = np.random.default_rng(0).standard_normal((STEPS, INPUTS)).astype(object)
    seconds = np.ones(ticks)  # touched now: pages of an empty array would count as growth
    grown_from = status_bytes("VmRSS") if available() else 0
    for tick in range(ticks):
        step = tick % STEPS
        point = DataPoint(tick // STEPS, step, step >= 100, states[step])
        start = time.perf_counter()
        model.predict(point)
        seconds[tick] = time.perf_counter() - start
        if tick == ticks // 10 and available():
            grown_from = status_bytes("VmRSS")
    grown = status_bytes("VmRSS") - grown_from if available() else 0
    points = np.percentile(seconds, [50, 99, 99.9])
    return {
        **{name: 1e6 * float(value) for name, value in zip(("p50", "p99", "p99.9"), points, strict=True)},
        "mean": 1e6 * float(seconds.mean()),
        "grown_bytes": float(grown),
    }


def time_cold_ticks(ensemble: Ensemble, precision: str, weight_bytes: int) -> float:
    """Median microseconds of a tick whose weights come from memory, others having taken their place in every cache."""
    copies = [copy.deepcopy(ensemble) for _ in range(_COLD_BYTES // weight_bytes + 1)]
    models = [PredictionModel(one, precision) for one in copies]  # type: ignore[arg-type]
    states = np.random.default_rng(0).standard_normal((STEPS, INPUTS)).astype(object)
    times = []
    for step in range(6):
        for model in models:
            point = DataPoint(0, step, True, states[step])
            start = time.perf_counter()
            model.predict(point)
            times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def floor(weights: int, dtype: torch.dtype, cold: bool) -> float:
    """Microseconds to read so many weights in one matrix-vector product, its reading and little else."""
    width = 512
    copies = max(1, _COLD_BYTES // (weights * dtype.itemsize)) if cold else 1
    rows = max(1, weights // width)
    # A network of no layers but a wide head is exactly that product.
    readers = [EnsembleStepper([_product(rows, width, dtype)]) for _ in range(copies)]
    x, times = np.zeros(1, dtype=np.float32), []
    for turn in range(max(200, 3 * copies)):
        reader = readers[turn % copies]
        start = time.perf_counter()
        reader(x)
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def _product(rows: int, width: int, dtype: torch.dtype) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    from mambakit.nn import Backbone

    stack = Backbone(width, 1, "mamba", {"d_state": 1, "expand": 0.0625, "dt_rank": 1})
    return nn.Linear(1, width).to(dtype), stack.to(dtype), nn.Linear(width, rows).to(dtype)


def main() -> None:
    """Print the table, one row for each way of taking ticks, and the verdicts."""
    options = _options()
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 130)
    rows, verdicts = [], []
    for kind in options.kinds:
        for features, precision in (("raw", "float32"), ("engineered", "float32"), ("engineered", "bfloat16")):
            ensemble = make_ensemble(kind, features, options.models, options.d_model, options.n_layers)
            weights = sum(parameter.numel() for model in ensemble.models for parameter in model.parameters())
            dtype = torch.float32 if precision == "float32" else torch.bfloat16
            read = {"warm": floor(weights, dtype, cold=False), "cold": floor(weights, dtype, cold=True)}
            times = time_ticks(PredictionModel(ensemble, precision), options.ticks)  # type: ignore[arg-type]
            rows.append({"kind": kind, "features": features, "weights": precision, "bytes": weights * dtype.itemsize})
            times["cold"] = time_cold_ticks(ensemble, precision, weights * dtype.itemsize)
            rows[-1] |= {**times, "floor_warm": read["warm"], "floor_cold": read["cold"]}
            if kind == "mamba":
                verdicts += _verdicts(rows[-1])
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(io.BytesIO(submission(ensemble))) as archive:
                archive.extractall(folder)
            times = time_ticks(SubmittedModel(Path(folder)), min(options.ticks, 2_000))
        rows.append({"kind": kind, "features": "engineered", "weights": "NumPy, packed", **times})
    console.print(", ".join(f"{name} {value}" for name, value in machine.describe().items()))
    console.print(f"load average {machine.load_average()}; {options.models} models, d_model {options.d_model}")
    console.print(_table(rows))
    for passed, sentence in verdicts:
        console.print(f"{'PASS' if passed else 'FAIL'}  {sentence}")
    if options.json:
        record = {"rows": rows, "verdicts": [{"passed": passed, "what": sentence} for passed, sentence in verdicts]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _verdicts(row: dict[str, Any]) -> list[tuple[bool, str]]:
    name = f"mamba, {row['features']}, {row['weights']}"
    warm, cold, whole = (
        row["p50"] / row["floor_warm"],
        row["cold"] / row["floor_cold"],
        CONTEST_TICKS * row["mean"] / 1e6,
    )
    return [
        (cold <= LIMIT, f"{name}: a tick takes {cold:.2f} times the reading of its weights, from memory both"),
        (warm <= LIMIT, f"{name}: a tick takes {warm:.2f} times the reading of its weights, from the cache both"),
        (whole < CONTEST_SECONDS, f"{name}: {CONTEST_TICKS:,} ticks take {whole:.0f} s (wanted {CONTEST_SECONDS})"),
        (row["grown_bytes"] < 2 << 20, f"{name}: memory grew by {row['grown_bytes'] / 2**20:.2f} MB"),
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="microseconds of a tick", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kind", "features", "weights", "MB", "p50", "p99", "p99.9", "mean", "read", "cold p50", "cold read"):
        table.add_column(column, justify="right" if column not in ("kind", "features", "weights") else "left")
    for row in rows:
        numbers = [row[name] for name in ("p50", "p99", "p99.9", "mean")]
        floors = [row.get(name) for name in ("floor_warm", "cold", "floor_cold")]
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "-"
        cells = [f"{number:.0f}" if number is not None else "-" for number in (*numbers, *floors)]
        table.add_row(row["kind"], row["features"], row["weights"], size, *cells)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream_latency", description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--kinds", type=lambda text: tuple(text.split(",")), default=("mamba", "mamba2", "mamba3"))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
