"""The record of `python -m benchmarks.gpu` as text: each case as it is measured, then the tables.

`python -m benchmarks.gpu_report RECORD.json` prints a record as the tables of docs/gpu.md.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_case import OURS

_KINDS = {"forward": "forward", "forward_backward": "forward+backward"}


def title(case: Mapping[str, Any]) -> str:
    """A case's name, shape and dtype."""
    return f"{case['operation']} {case['shape']} {str(case['dtype']).removeprefix('torch.')}"


def print_result(console: Console, result: Mapping[str, Any]) -> None:
    """A case as it is measured: a line for each kind of call and each clock, then the errors."""
    console.print(f"\n{title(result)} ({result['seconds']} s)")
    for kind, spelled in _KINDS.items():
        if kind in result:
            part = result[kind]
            for clock, label in (("milliseconds", "single call"), ("device_milliseconds", "device alone")):
                times = ", ".join(f"{name} {number(ms)}" for name, ms in part[clock].items())
                console.print(f"  {spelled}, {label}, ms: {times or 'not measured'}")
            if part["floor"]:
                console.print(f"  {spelled}, floor, ms: {number(part['floor'])}")
    for name, reason in result["refused"].items():
        console.print(f"  {name}: {reason}")
    for name, errors in result["errors"].items():
        console.print(f"  error of {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    for note in result["notes"]:
        console.print(f"  {note}")


def print_times(console: Console, results: list[dict[str, Any]]) -> None:
    """Ours beside each rival and the floor. Goals are judged on single calls; the device's times stand beside them."""
    table = Table(title="Medians in ms: single calls, on which goals are judged / the device alone, the host hidden")
    for heading in ("case", "", "ours", "device", "floor", "device / floor", "rival", "its", "device"):
        table.add_column(heading, justify="left" if heading in ("case", "", "rival") else "right")
    for heading in ("its / ours", "on the device", "goal", "met"):
        table.add_column(heading, justify="right")
    for result in results:
        for kind in _KINDS:
            if kind in result:
                for place, rival in enumerate(result[kind]["rivals"] or {"": {}}):
                    table.add_row(*_row(result, kind, rival, place == 0))
    console.print(table)


def _row(result: Mapping[str, Any], kind: str, rival: str, first: bool) -> tuple[str, ...]:
    part = result[kind]
    single, device, beside = part["milliseconds"], part["device_milliseconds"], part["rivals"].get(rival, {})
    met = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[beside.get("goal_met")]
    ours = (
        title(result) if kind == "forward" else "",
        _KINDS[kind],
        number(single.get(OURS)),
        number(device.get(OURS)),
        number(part["floor"]),
        number(part["times_the_floor"]),
    )
    return (
        *(ours if first else [""] * len(ours)),
        rival,
        number(single.get(rival)) or ("absent" if rival else ""),
        number(device.get(rival)),
        number(beside.get("times_faster")),
        number(beside.get("times_faster_on_the_device")),
        number(beside.get("goal")),
        met,
    )


def print_errors(console: Console, results: list[dict[str, Any]]) -> None:
    """Errors of every output and gradient, ours beside each rival's on the same inputs."""
    table = Table(title="||got - exact|| / ||exact|| against float64; 'above' names what ours is less exact in")
    for heading in ("case", "rival", "ours / its, of each output and gradient", "above"):
        table.add_column(heading)
    for case, rival, both, above in _compared(results):
        pairs = ", ".join(f"{name} {ours:.1e} / {its:.1e}" for name, (ours, its) in both.items())
        table.add_row(case, rival, pairs, above)
    if table.row_count:
        console.print(table)


def number(value: float | None) -> str:
    """Three digits; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(results: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of two tables: times, `single call / device alone` in each cell, and errors."""
    yield "| case | | ours, ms | floor | rival | its, ms | its / ours | goal |"
    yield "|---|---|---|---|---|---|---|---|"
    for result in results:
        for kind in _KINDS:
            if kind in result:
                for place, rival in enumerate(result[kind]["rivals"] or {"": {}}):
                    case, passes, ours, device, floor, _, *beside = _row(result, kind, rival, place == 0)
                    name, its, its_device, faster, faster_device, goal, met = beside
                    verdict = {"": "", "[green]yes[/green]": " met", "[red]no[/red]": " missed"}[met]
                    cells = (_pair(ours, device), floor, name, _pair(its, its_device), _pair(faster, faster_device))
                    yield f"| {' | '.join((case, passes if place == 0 else '', *cells, goal + verdict))} |"
    yield ""
    yield "| case | rival | largest error, ours / its | where ours is larger |"
    yield "|---|---|---|---|"
    for case, rival, both, above in _compared(results):
        largest = " / ".join(f"{max(pair[side] for pair in both.values()):.1e}" for side in (0, 1))
        yield f"| {case} | {rival} | {largest} | {above} |"


def _compared(results: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, tuple[float, float]], str]]:
    """Of every case and rival the errors, ours and its, by name, and those in which ours is above, as text."""
    for result in results:
        errors = result["errors"]
        for rival in errors:
            if rival == OURS or OURS not in errors:
                continue
            both = {name: (errors[OURS][name], errors[rival][name]) for name in errors[OURS] if name in errors[rival]}
            above = ", ".join(f"{name} {ours / its:.2f}x" for name, (ours, its) in both.items() if ours > its > 0)
            yield title(result), rival, both, above


def _pair(single: str, device: str) -> str:
    return f"{single} / {device}" if single and device else single


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.gpu_report RECORD.json")
    print("\n".join(markdown(json.loads(Path(sys.argv[1]).read_text("utf-8"))["cases"])))
