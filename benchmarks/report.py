"""The table that people read and the record that programs read."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import times
from benchmarks.floors import Rates
from benchmarks.long_sequences import CHUNK, D_MODEL, LongResult
from benchmarks.memory import MemoryResult
from benchmarks.runner import CaseResult, PeerResult
from benchmarks.timing import Timing

WIDTH = 150  # of output that is no terminal


def print_machine(console: Console, facts: dict[str, str], rates: Rates) -> None:
    """What the figures hold for, a fact a line."""
    for name, fact in {**facts, "rates": str(rates)}.items():
        console.print(f"{name}: {fact}", highlight=False)


def print_timings(console: Console, results: list[CaseResult], rates: Rates) -> None:
    """One row for each peer; then how each floor was computed."""
    table = Table(title="Time: medians, ours and the peers taking turns in one process")
    table.add_column("case (shape)", max_width=34)
    for heading in ("ours ms", "spread"):
        table.add_column(heading, justify="right")
    table.add_column("beside")
    for heading in ("its ms", "its / ours", "of fastest"):
        table.add_column(heading, justify="right")
    table.add_column("goal")
    table.add_column("met")
    for heading in ("floor ms", "ours / floor"):
        table.add_column(heading, justify="right")
    for result in results:
        for index, peer in enumerate(result.peers):
            table.add_row(
                *(_of_case(result) if index == 0 else _REPEATED), *_of_peer(result, peer), *_floor(result, rates, index)
            )
        table.add_section()
    console.print(table)
    for result in results:
        if result.case.floor:
            console.print(f"floor of {result.case.name}: {result.case.floor(rates).how}", style="dim", highlight=False)


_REPEATED = ("", "", "")


def _of_case(result: CaseResult) -> tuple[str, str, str]:
    name = f"{result.case.name}\n{result.case.shape}"
    return name, _number(result.ours.median), f"{result.ours.spread:.0%}"


def _of_peer(result: CaseResult, peer: PeerResult) -> tuple[str, ...]:
    goal, ratio, met = str(peer.peer.goal or ""), result.ratio(peer), result.met(peer)
    if peer.timing is None or ratio is None:
        return peer.peer.name, peer.absent, "", "", goal, ""
    once = " (one run)" if peer.peer.once else ""
    fastest = peer.timing.best / result.ours.best
    return (
        peer.peer.name + once,
        _number(peer.timing.median),
        times(ratio),
        times(fastest),
        goal,
        _verdict(met),
    )


def _floor(result: CaseResult, rates: Rates, index: int) -> tuple[str, str]:
    if result.case.floor is None or index > 0:
        return "", ""
    floor = result.case.floor(rates).ms
    return _number(floor), times(result.ours.median / floor)


def _verdict(met: bool | None) -> str:
    return "" if met is None else "[green]yes[/green]" if met else "[red]no[/red]"


def _number(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_memory(console: Console, results: list[MemoryResult]) -> None:
    """One row for each scan: bytes a token, straightness, and what autograd keeps."""
    first = results[0]
    lengths = [sample.length for sample in first.samples]
    table = Table(title=f"Memory: scan forward + backward, (1, length, {first.dim}, {first.state}), MB over the inputs")
    table.add_column("scan")
    for length in lengths:
        table.add_column(f"peak, {length}", justify="right")
    for heading in ("bytes a token", "kept by autograd, bytes a token", "one tensor of states, bytes a token"):
        table.add_column(heading, justify="right")
    table.add_column("goal: linear")
    table.add_column("goal: no states kept")
    for result in results:
        longest = result.samples[-1]
        table.add_row(
            result.name,
            *(_number(sample.peak_bytes / 1e6) for sample in result.samples),
            _number(result.line[0]),
            _number(longest.saved_bytes / longest.length),
            _number(result.states_bytes),
            _verdict(result.linear),
            _verdict(result.keeps_no_states),
        )
    console.print(table)


def print_long_sequences(console: Console, results: list[LongResult]) -> None:
    """One row for each mixer: time per token at every length, how it grows, and the memory of the longest."""
    table = Table(title=f"One sequence in chunks of {CHUNK}, state carried, d_model {D_MODEL}: microseconds a token")
    table.add_column("mixer")
    for run in results[0].runs:
        table.add_column(f"{run.length:,}", justify="right")
    table.add_column("grows as length to the", justify="right")
    for run in (results[0].runs[0], results[0].runs[-1]):
        table.add_column(f"peak MB, {run.length:,}", justify="right")
    for result in results:
        table.add_row(
            result.name,
            *(_number(run.microseconds_a_token) for run in result.runs),
            f"{result.slope:+.3f}",
            *(_number(run.peak_bytes / 1e6) for run in (result.runs[0], result.runs[-1])),
        )
    console.print(table)


def as_record(
    machine: dict[str, str],
    rates: Rates,
    results: list[CaseResult],
    memories: list[MemoryResult],
    long_runs: list[LongResult],
) -> dict[str, Any]:
    """Every sample and what follows from it, for JSON."""
    return {
        "machine": machine,
        "rates": dataclasses.asdict(rates),
        "cases": [_case_record(result, rates) for result in results],
        "memory": [_memory_record(result) for result in memories],
        "long sequences": [dataclasses.asdict(result) | {"slope": result.slope} for result in long_runs],
    }


def _case_record(result: CaseResult, rates: Rates) -> dict[str, Any]:
    return {
        "case": result.case.name,
        "shape": result.case.shape,
        "ours": _timing_record(result.ours),
        "floor": result.case.floor and dataclasses.asdict(result.case.floor(rates)),
        "peers": [
            {
                "name": peer.peer.name,
                "absent": peer.absent,
                "timing": peer.timing and _timing_record(peer.timing),
                "ratio": result.ratio(peer),
                "goal": peer.peer.goal and peer.peer.goal.least,
                "met": result.met(peer),
            }
            for peer in result.peers
        ],
    }


def _timing_record(timing: Timing) -> dict[str, Any]:
    return {"median_ms": timing.median, "best_ms": timing.best, "samples_ms": timing.samples}


def _memory_record(result: MemoryResult) -> dict[str, Any]:
    return {
        **dataclasses.asdict(result),
        "bytes_a_token": result.line[0],
        "linear": result.linear,
        "keeps_no_states": result.keeps_no_states,
    }
