"""`python -m benchmarks.gpu`: the GPU kernels beside their peers, each time beside what the hardware allows.

    python -m benchmarks.gpu [--json FILE] [--only scan,ssd,mamba3,layers] [--case TEXT] [--minutes 3.5] [--processes 8]

Nothing is built: peers that are not installed are named as absent. Kernels are compiled beforehand, in several
processes, which leave them in Triton's cache; with `--processes 0` each is compiled when it is first called.
Implementations take turns on the same GPU, and the figures are medians over all turns, each told twice: the single
call, launched on an idle device, on which the goals are judged; and the device's time alone, the host having run ahead.
The cases that say most come first; those for which the minutes do not suffice are named as left out. The record is
written after every case, so that a run that is cut short keeps what it has, and the same command goes on with it.
Kernels of peers that tune themselves do so in shorter turns than they would, which is most of what they need.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.gpu_case import OURS, Case, Ceilings, Contender, Floor
from benchmarks.gpu_report import print_errors, print_result, print_times, title

MODULES = ("scan", "ssd", "mamba3", "layers")  # benchmarks/gpu_<name>.py
PACKAGES = ("mambakit", "torch", "triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "transformers")
_TURNS, _BUDGET = 3, 60.0  # of each contender, and the ms of one turn
_KINDS = ("forward", "forward_backward")
_ENOUGH = 3600.0  # seconds for all cases


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the record to this file, case by case")
    parser.add_argument("--only", default=",".join(MODULES), help=f"some of {','.join(MODULES)}")
    parser.add_argument("--case", default="", help="only cases that have this text in their name, shape or dtype")
    parser.add_argument("--minutes", type=float, help="begin no further case after so many")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile beforehand")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(MODULES):
        parser.error(f"--only takes some of {', '.join(MODULES)}, got {sorted(unknown)[0]!r}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures kernels on a CUDA GPU, and torch finds none here")

    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    seconds = 60 * options.minutes if options.minutes is not None else _ENOUGH
    until = time.monotonic() + seconds
    facts = _facts()
    done = made_before(options.json, facts) if options.json else []
    measured = {title(result) for result in done}
    every = [case for case in in_order(names) if options.case in title(vars(case))]
    found = [case for case in every if title(vars(case)) not in measured]
    tune_in(warmup=5, rep=20)
    warmed = warm_up([title(vars(case)) for case in found], options.processes, seconds / 2)
    ceilings = Ceilings(gpu_timing.copy_rate(), gpu_timing.product_rate(), gpu_timing.exponential_rate())
    record: dict[str, Any] = {
        **facts,
        "ceilings": vars(ceilings),
        "warmed_up_in": warmed,
        "left_out": [],
        "cases": done,
    }
    for name in ("date", "gpu", "versions", "ceilings", "warmed_up_in"):
        console.print(f"{name}: {record[name]}")
    for case in found:
        if time.monotonic() > until:
            record["left_out"].append(title(vars(case)))
            continue
        result = {**run(case, ceilings), "date": _now()}
        record["cases"].append(result)
        print_result(console, result)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print_times(console, record["cases"])
    print_errors(console, record["cases"])
    for left_out in record["left_out"]:
        console.print(f"left out, the {options.minutes} minutes being over: {left_out}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")


def in_order(names: list[str]) -> list[Case]:
    """Cases of the modules in turns, since each yields what says most first."""
    modules = [importlib.import_module(f"benchmarks.gpu_{name}").cases() for name in names]
    return [case for row in itertools.zip_longest(*modules) for case in row if case is not None]


def made_before(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases of the record at `path`, none where it is not there; of another GPU or version it ends the program."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text("utf-8"))
        there = {name: record[name] for name in ("gpu", "versions")}
        cases: list[dict[str, Any]] = record["cases"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        sys.exit(f"{path} holds no record of this benchmark ({type(error).__name__}); choose another file")
    for name, value in there.items():
        if value != facts[name]:
            sys.exit(f"{path} holds a record of another {name.rstrip('s')}: {value}; choose another file")
    return cases


def tune_in(warmup: int, rep: int) -> None:
    """Let Triton's autotuner take so many milliseconds for a configuration; by default it takes 25 and 100."""
    import triton.testing

    triton.testing.do_bench = functools.partial(triton.testing.do_bench, warmup=warmup, rep=rep)


def warm_up(titles: list[str], processes: int, seconds: float) -> str:
    """Call what the cases call, in several processes, so that its kernels lie compiled in Triton's cache on disk.

    Processes that need more than so many seconds are ended: what they leave is compiled when it is first called.
    """
    start = time.monotonic()
    processes = processes if titles else 0
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=call_once, args=(titles, part, processes), daemon=True) for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, start + seconds - time.monotonic()))
        worker.kill()
    return f"{time.monotonic() - start:.0f} s by {processes} processes"


def call_once(titles: list[str], part: int, parts: int) -> None:
    """One part of what the cases of these titles call, once; but for what takes seconds.

    Every case of layers, which fill the GPU's memory, and ours of every other are called by one part; peers of these by
    all, for they try many configurations, of which each part takes its share.
    """
    tune_in(warmup=1, rep=1)
    share_configurations(part, parts)
    by_title = {title(vars(case)): case for case in in_order(list(MODULES))}
    large = {title(vars(case)) for case in in_order(["layers"])}
    for place, name in enumerate(titles):
        for contender, build in by_title[name].contenders.items():
            if place % parts != part and (contender == OURS or name in large):
                continue
            with contextlib.suppress(Exception):  # it fails once more when it is measured, and is named there
                _call_once(build())
            gc.collect()
            torch.cuda.empty_cache()


def share_configurations(part: int, parts: int) -> None:
    """Let Triton's autotuner try only every so many-th configuration."""
    from triton.runtime.autotuner import Autotuner

    pruned = Autotuner.prune_configs

    def prune(self: Any, arguments: Any) -> Any:
        configurations = list(pruned(self, arguments))
        return configurations[part % len(configurations) :: parts]

    Autotuner.prune_configs = prune


def _call_once(contender: Contender) -> None:
    for call in (contender.forward, contender.forward_backward, contender.results):
        if call is not None and not contender.once:
            call()
    torch.cuda.synchronize()


def run(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """Time every contender, in turns, and hold what it gives against float64."""
    start = time.monotonic()
    built: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    for name, build in case.contenders.items():
        try:
            built[name] = build()
        except Exception as error:  # a peer that fails must not end the run
            refused[name] = gpu_timing.reason(error)
    result: dict[str, Any] = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "notes": list(case.notes),
        "refused": refused,
    }
    floors = {"forward": case.forward_floor, "forward_backward": case.forward_backward_floor}
    once = {name for name, contender in built.items() if contender.once}
    for kind in _KINDS:
        calls = {name: call for name, contender in built.items() if (call := getattr(contender, kind)) is not None}
        if calls:
            times = gpu_timing.measure(calls, once, _TURNS, _BUDGET)
            refused |= {f"{name}, {kind}": why for name, why in times.pop("failed").items()}
            result[kind] = judged(case, kind, times, floors[kind], ceilings)
    result["errors"] = _errors(case, built, refused)
    del built
    gc.collect()
    torch.cuda.empty_cache()
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def judged(case: Case, kind: str, times: dict[str, Any], floor: Floor | None, ceilings: Ceilings) -> dict[str, Any]:
    """`times` with the floor, and beside each rival: how many times faster ours is, by both clocks, and the goal."""
    single, device = times["milliseconds"], times["device_milliseconds"]
    lowest = None if floor is None else floor.milliseconds(ceilings)
    rivals = {}
    for name, goals in case.goals.items():
        goal = goals[_KINDS.index(kind)]
        faster = _ratio(single.get(name), single.get(OURS))
        rivals[name] = {
            "times_faster": faster,
            "times_faster_on_the_device": _ratio(device.get(name), device.get(OURS)),
            "goal": goal,
            "goal_met": None if faster is None or goal is None else faster >= goal,
        }
    return {**times, "floor": lowest, "times_the_floor": _ratio(device.get(OURS), lowest), "rivals": rivals}


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _errors(case: Case, built: Mapping[str, Contender], refused: dict[str, str]) -> dict[str, dict[str, float]]:
    """||got - exact|| / ||exact|| of every output and gradient, by contender."""
    if case.exact is None or not any(contender.results for contender in built.values()):
        return {}
    exact = case.exact()
    errors: dict[str, dict[str, float]] = {}
    for name, contender in built.items():
        if contender.results is None:
            continue
        try:
            found = contender.results()
        except Exception as error:
            refused[f"{name}, results"] = gpu_timing.reason(error)
            continue
        errors[name] = {key: _error(value, exact[key]) for key, value in found.items() if key in exact}
    return errors


def _error(got: Tensor, exact: Tensor) -> float:
    ratio = ((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()
    return ratio if ratio == ratio else float("inf")


def _facts() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"date": _now(), "gpu": torch.cuda.get_device_name(), "versions": versions}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")


if __name__ == "__main__":
    main()
