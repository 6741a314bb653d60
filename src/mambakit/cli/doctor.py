"""`mambakit doctor`: what this installation is made of, what serves which device, and whether it computes rightly."""

import importlib.metadata
import os
import platform
import sys
import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "numpy", "accelerate", "safetensors", "pandas", "TA-Lib", "transformers", "triton")


def doctor() -> None:
    """Show versions, backends and devices, and check every backend against the reference.

    That takes about a second; with a GPU also the time to compile its kernels, which is shown.

    Exits with status 1 when a backend disagrees with the reference.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for title, rows in (("Versions", _versions()), ("Machine", _machine()), ("Backends", _backends())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)
        console.print()
    if not _print_checks(console):
        raise typer.Exit(1)


def _versions() -> list[tuple[str, str]]:
    from mambakit import __version__

    rows = [("mambakit", __version__), ("Python", f"{platform.python_version()} on {platform.platform()}")]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _machine() -> list[tuple[str, str]]:
    import torch

    from mambakit.ops import cpu

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    if cpu.AVAILABLE and not cpu.native.openmp:
        threads += " (the kernels run on one: they were built without OpenMP)"
    rows = [("processor", platform.processor() or platform.machine()), ("threads", threads)]
    if cpu.AVAILABLE:
        others = ", ".join(cpu.native.instruction_sets())
        rows.append(("instruction set", f"{cpu.native.instruction_set()} (this processor runs: {others})"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("GPU", ", ".join(gpus) or "none that torch can use"))
    return rows


def _backends() -> list[tuple[str, str]]:
    import torch

    from mambakit.ops import dispatch

    rows = []
    for name in dispatch.BACKENDS:
        device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
        reason = dispatch.refusal(name, device)
        rows.append((name, "available" if reason is None else f"not available: {reason}"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return rows + [(f"{name} tensors", f"served by {dispatch.choose(torch.device(name))}") for name in devices]


def _print_checks(console: "Console") -> bool:
    from rich.table import Table

    from mambakit.ops.self_check import self_check

    start = time.perf_counter()
    table = Table(title="Self-check against the reference", title_justify="left", box=None, padding=(0, 2))
    for heading in ("operation", "backend", "device", "error", "first call", ""):
        table.add_column(heading)
    checks = list(self_check())
    for check in checks:
        verdict = "[green]ok[/green]" if check.passed else "[red]WRONG[/red]"
        # Elsewhere the first of all calls loads libraries, and nothing is compiled.
        first_call = f"{check.first_call:.1f} s" if check.backend == "triton" else ""
        table.add_row(check.operation, check.backend, check.device, f"{check.error:.1e}", first_call, verdict)
    console.print(table)
    wrong = sum(not check.passed for check in checks)
    seconds = time.perf_counter() - start
    verdict = f"[red]{wrong} wrong[/red]" if wrong else "[green]all agree[/green]"
    console.print(f"\n{len(checks)} checks in {seconds:.1f} s: {verdict}")
    if any(check.backend == "triton" for check in checks):
        console.print("The first call of a kernel on triton compiles it; Triton keeps the result in its cache on disk.")
    return wrong == 0
