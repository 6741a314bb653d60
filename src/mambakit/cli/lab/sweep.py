"""`mambakit lab sweep`: a grid of settings and many seeds."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = r"""
A FILE.toml holds one table or more:

  [\[experiments]]

  task = "composite"

  preset = "mini"

  seeds = [0, 1, 2]

  settings = {n_layers = 3}

  grid = {gamma = [0.5, 1.0], model = ["standard", "ones"]}

Only task must be given; settings are those of lab run --set. Every combination of the grid is run with every seed.

A FILE.py defines sweep: a list of such tables as dicts, or a function without arguments that gives one:

  sweep = [{"task": "parity", "grid": {"mixer": ["mamba2", "mamba3"]}, "seeds": list(range(3))}]

What is done in the folder is not run again, and what was killed goes on: give the same command once more, or a file
with more in it.
"""


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml|FILE.py", help="What to run; see below.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, a folder each.")],
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, separated by commas, in place of those of the file.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (extra 'ray').")] = "local",
    workers: Annotated[
        int, typer.Option(help="Local runs at once: processes that share the cores, or streams that share a GPU.")
    ] = 1,
    together: Annotated[
        int | None,
        typer.Option(help="The most models trained as one; by default all of one shape on a GPU, one on a CPU."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, or local to start one here; by default one that runs here, or local."),
    ] = None,
    gpus: Annotated[float, typer.Option(help="Share of a GPU that each run gets under Ray.")] = 0.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default a GPU where there is one.")] = None,
    capture: Annotated[bool, typer.Option("--capture", help="On a GPU: replay each step as a CUDA graph.")] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="On a GPU: matrix products in TF32; the records say so.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Put aside what would not end in so many; the command again goes on with it.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run a grid over task, model and settings, for many seeds; those of one shape are trained together."""
    import sys

    from mambakit.cli.lab.run import parsed_seeds
    from mambakit.lab.sweep import sweep as run_sweep

    made = run_sweep(
        file,
        out,
        seeds=None if seeds is None else parsed_seeds(seeds),
        engine=engine,
        workers=workers,
        together=together,
        address=address,
        gpus=gpus,
        device=device,
        capture=capture,
        tf32=tf32,
        minutes=minutes,
        quiet=quiet,
        say=(lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True)),
    )
    print(f"{len(made)} runs made in {out}; tables and figures: mambakit lab report {out}")
