"""The command: `python -m benchmarks`."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks import long_sequences, machine, memory, report
from benchmarks.cases import all_cases
from benchmarks.floors import measure_rates
from benchmarks.runner import run_case

MEMORY, LONG = "memory", "long sequences"


def main() -> None:
    """Run the cases that were asked for, print the tables, and write the record."""
    cases = all_cases()
    options = _options([*(case.name for case in cases), MEMORY, LONG])
    console = Console(width=None if Console().is_terminal else report.WIDTH)
    load = machine.load_average()
    rates = measure_rates()
    results = []
    for case in cases:
        if _wanted(case.name, options.only):
            console.print(f"{case.name} ...", style="dim")
            rates = rates.best(measure_rates())
            results.append(run_case(case, console.print, quick=options.quick))
    memories = []
    if _wanted(MEMORY, options.only):
        if memory.available():
            console.print(f"{MEMORY} ...", style="dim")
            memories = [memory.measure(name) for name in memory.SCANS]
        else:
            console.print("memory: left out, this system does not tell the peak of a process")
    long_runs = []
    if _wanted(LONG, options.only) and memory.available():
        console.print(f"{LONG} ...", style="dim")
        long_runs = [long_sequences.measure(name) for name in long_sequences.NAMES]

    machine_facts = machine.describe() | {"load average": f"{load} before, {machine.load_average()} after"}
    report.print_machine(console, machine_facts, rates)
    if results:
        report.print_timings(console, results, rates)
    if memories:
        report.print_memory(console, memories)
    if long_runs:
        report.print_long_sequences(console, long_runs)
    if options.json:
        record = report.as_record(machine_facts, rates, results, memories, long_runs)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _options(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="mambakit beside its peers")
    parser.add_argument("--quick", action="store_true", help="leave out the peers that take minutes a run")
    parser.add_argument("--only", metavar="NAME", help=f"cases whose name contains NAME: {', '.join(names)}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure to FILE")
    options = parser.parse_args()
    if options.only and not any(_wanted(name, options.only) for name in names):
        parser.error(f"--only {options.only!r} names no case; there are {', '.join(names)}")
    return options


def _wanted(name: str, only: str | None) -> bool:
    return only is None or only in name


if __name__ == "__main__":
    main()
