"""`python -m benchmarks.gpu`: the GPU kernels beside their peers, each time beside what the hardware allows.

    python -m benchmarks.gpu [--json FILE] [--only scan,ssd,mamba3,layers] [--quick]

Nothing is built: peers that are not installed are named as absent. Implementations take turns on the same GPU, and the
figures are medians over all turns. The record is written after every case, so that a run that is cut short keeps what
it has.
"""

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.gpu_case import Case, Ceilings, Contender, Floor

MODULES = ("scan", "ssd", "mamba3", "layers")  # benchmarks/gpu_<name>.py
PACKAGES = ("mambakit", "torch", "triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "transformers")
_EXPONENTIALS_A_CLOCK = 16  # of each multiprocessor
_CACHE = 256 << 20  # bytes written before each run, so that none finds its inputs in the cache
_SLOW = 1000.0  # milliseconds from which on one measurement has to do
_OURS = "mambakit"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the record to this file, case by case")
    parser.add_argument("--only", default=",".join(MODULES), help=f"some of {','.join(MODULES)}")
    parser.add_argument("--quick", action="store_true", help="one short turn each: for a look, not for figures")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(MODULES):
        parser.error(f"--only takes some of {', '.join(MODULES)}, got {sorted(unknown)[0]!r}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures kernels on a CUDA GPU, and torch finds none here")

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    ceilings = measure_ceilings()
    record: dict[str, Any] = {**_facts(), "ceilings": vars(ceilings), "cases": []}
    for name, fact in record.items():
        if name != "cases":
            console.print(f"{name}: {fact}")
    for case in _cases(names, console):
        result = run(case, ceilings, quick=options.quick)
        record["cases"].append(result)
        print_result(console, result)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    print_summary(console, record["cases"])


def _cases(names: list[str], console: Console) -> Iterator[Case]:
    for name in names:
        if importlib.util.find_spec(f"benchmarks.gpu_{name}") is None:
            console.print(f"{name}: benchmarks/gpu_{name}.py is not here")
        else:
            yield from importlib.import_module(f"benchmarks.gpu_{name}").cases()


def measure_ceilings() -> Ceilings:
    """A copy of a gigabyte, a bfloat16 product of two 8192 x 8192 matrices, exponentials from clock and width."""
    from triton.runtime import driver

    bytes_copied = torch.randint(-128, 127, (2, 1 << 30), dtype=torch.int8, device="cuda")
    copy = statistics.median(_milliseconds(lambda: bytes_copied[0].copy_(bytes_copied[1]), 300))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    product = statistics.median(_milliseconds(lambda: a @ b, 300))
    properties = driver.active.utils.get_device_properties(torch.cuda.current_device())
    clock = 1e3 * properties["sm_clock_rate"]
    count = torch.cuda.get_device_properties("cuda").multi_processor_count
    return Ceilings(2 * 2**30 / (1e-3 * copy), 2 * 8192**3 / (1e-3 * product), _EXPONENTIALS_A_CLOCK * count * clock)


def run(case: Case, ceilings: Ceilings, *, quick: bool) -> dict[str, Any]:
    """Time every contender, in turns, and hold what it gives against float64."""
    built: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, build in case.contenders.items():
        try:
            built[name] = build()
        except Exception as error:  # a peer that fails must not end the run
            absent[name] = _reason(error)
    result: dict[str, Any] = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rival": case.rival,
        "notes": list(case.notes),
        "absent": absent,
    }
    kinds: list[tuple[str, Floor | None, float | None]] = [
        ("forward", case.forward_floor, case.forward_goal),
        ("forward_backward", case.forward_backward_floor, case.forward_backward_goal),
    ]
    for kind, floor, goal in kinds:
        calls = {name: call for name, contender in built.items() if (call := getattr(contender, kind)) is not None}
        if calls:
            result[kind] = _times(calls, absent, quick) | _verdict(floor, goal, ceilings)
            _judge(result[kind], case.rival)
    result["errors"] = _errors(case, built, absent)
    del built
    gc.collect()
    torch.cuda.empty_cache()
    return result


def _times(calls: Mapping[str, Callable[[], Any]], absent: dict[str, str], quick: bool) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns, budget = (1, 30.0) if quick else (3, 150.0)
    for _ in range(turns):
        for name, call in calls.items():
            if name in absent or any(time >= _SLOW for time in samples[name]):
                continue
            try:
                samples[name] += _milliseconds(call, budget)
            except Exception as error:
                absent[name] = _reason(error)
    found = {name: times for name, times in samples.items() if times and name not in absent}
    return {
        "milliseconds": {name: statistics.median(times) for name, times in found.items()},
        "spread": {name: (max(times) - min(times)) / statistics.median(times) for name, times in found.items()},
    }


def _milliseconds(call: Callable[[], Any], budget: float) -> list[float]:
    """Times of single calls, each with the caches written over before it; of a slow call only one."""
    flush = torch.empty(_CACHE, dtype=torch.int8, device="cuda")
    call()  # compiles, warms up

    def once() -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    first = once()
    if first >= _SLOW:
        return [first]
    return [once() for _ in range(max(3, min(200, int(budget / max(first, 1e-3)))))]


def _verdict(floor: Floor | None, goal: float | None, ceilings: Ceilings) -> dict[str, Any]:
    return {"floor": None if floor is None else floor.milliseconds(ceilings), "goal": goal}


def _judge(result: dict[str, Any], rival: str) -> None:
    times = result["milliseconds"]
    ours, theirs = times.get(_OURS), times.get(rival)
    result["times_the_floor"] = ours / result["floor"] if ours and result["floor"] else None
    result["times_faster"] = theirs / ours if ours and theirs else None
    known = result["times_faster"] is not None and result["goal"] is not None
    result["goal_met"] = result["times_faster"] >= result["goal"] if known else None


def _errors(case: Case, built: Mapping[str, Contender], absent: dict[str, str]) -> dict[str, dict[str, float]]:
    """||got - exact|| / ||exact|| of every output and gradient, by contender."""
    if case.exact is None:
        return {}
    exact = case.exact()
    errors: dict[str, dict[str, float]] = {}
    for name, contender in built.items():
        if contender.results is None or name in absent:
            continue
        try:
            found = contender.results()
        except Exception as error:
            absent[f"{name}, results"] = _reason(error)
            continue
        errors[name] = {key: _error(value, exact[key]) for key, value in found.items() if key in exact}
    return errors


def _error(got: Tensor, exact: Tensor) -> float:
    ratio = ((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()
    return ratio if ratio == ratio else float("inf")


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:120]
    if isinstance(error, ImportError):
        return f"absent ({first})"
    return f"{type(error).__name__}: {first}"


def _facts() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    driver = getattr(torch.cuda, "driver_version", None)
    gpu = torch.cuda.get_device_name()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "gpu": gpu if driver is None else f"{gpu}, driver {driver()}",
        "versions": versions,
    }


def print_result(console: Console, result: Mapping[str, Any]) -> None:
    """A case as it is measured: a line a contender, then the errors."""
    console.print(f"\n{result['operation']} {result['shape']} {result['dtype']}")
    for kind in ("forward", "forward_backward"):
        if kind not in result:
            continue
        part = result[kind]
        times = ", ".join(f"{name} {_number(ms)}" for name, ms in part["milliseconds"].items())
        floor = f"; floor {_number(part['floor'])}" if part["floor"] else ""
        console.print(f"  {kind.replace('_', '+')} ms: {times}{floor}")
    for name, reason in result["absent"].items():
        console.print(f"  {name}: {reason}")
    for name, errors in result["errors"].items():
        console.print(f"  error of {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    for note in result["notes"]:
        console.print(f"  {note}")


def print_summary(console: Console, results: list[dict[str, Any]]) -> None:
    """The table: ours, the rival, the floor, the goal; then the largest errors, ours beside the rival's."""
    table = Table(title="Medians in ms")
    for heading in ("case", "", "ours", "floor", "ours / floor", "rival", "its", "its / ours", "goal", "met"):
        table.add_column(heading, justify="left" if heading in ("case", "", "rival") else "right")
    for result in results:
        for kind in ("forward", "forward_backward"):
            if kind in result:
                table.add_row(*_row(result, kind))
    console.print(table)
    errors = Table(title="||got - exact|| / ||exact|| against float64, the largest of outputs and gradients")
    for heading in ("case", "ours", "rival", "its"):
        errors.add_column(heading)
    for result in results:
        found = {name: max(values.values()) for name, values in result["errors"].items() if values}
        if _OURS in found:
            theirs = f"{found[result['rival']]:.1e}" if result["rival"] in found else ""
            errors.add_row(_title(result), f"{found[_OURS]:.1e}", result["rival"], theirs)
    console.print(errors)


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['operation']} {result['shape']} {result['dtype']}"


def _row(result: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    part, rival = result[kind], result["rival"]
    times = part["milliseconds"]
    met = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[part["goal_met"]]
    return (
        _title(result) if kind == "forward" else "",
        kind.replace("_", "+"),
        _number(times.get(_OURS)),
        _number(part["floor"]),
        _number(part["times_the_floor"]),
        rival,
        _number(times.get(rival)) or "absent",
        _number(part["times_faster"]),
        _number(part["goal"]),
        met,
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
