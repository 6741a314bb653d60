"""`mambakit lab run`: train an experiment for several seeds together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mambakit.lab.run import Outcome

EXAMPLES = """
A small run of composite functions, three seeds:

  mambakit lab run composite --seeds 0,1,2

With the convolution's kernels fixed at one, and with Mamba-3:

  mambakit lab run composite --set model=ones --out ones

  mambakit lab run composite --set mixer=mamba3 --set gamma=0.5 --out mamba3

As published, on a GPU:

  mambakit lab run composite --preset paper --set n_layers=5 --seeds 0,1,2 --out paper

Settings, tasks and models: mambakit lab list
"""


def run(
    task: Annotated[str, typer.Argument(help="The task; mambakit lab list names them.")],
    preset: Annotated[str, typer.Option(help="mini, for two cores and minutes, or paper, as published.")] = "mini",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be given often.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; they are trained together.")] = "0",
    out: Annotated[Path, typer.Option(help="Folder for the records and the weights.")] = Path("lab-run"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default a GPU where there is one.")] = None,
    grouping: Annotated[
        str, typer.Option(help="How seeds share a step: vmap, loop, or auto, the better one for the device.")
    ] = "auto",
    capture: Annotated[bool, typer.Option("--capture", help="On a GPU: replay each step as a CUDA graph.")] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="On a GPU: matrix products in TF32; the record says so.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a task's models for every seed, evaluate them as they learn, and record it all as JSON lines."""
    from mambakit.lab.presets import preset as preset_of
    from mambakit.lab.run import run as run_experiment

    experiment = preset_of(task, preset).changed(parsed_settings(settings or []))
    outcomes = run_experiment(
        experiment,
        parsed_seeds(seeds),
        out,
        preset=preset,
        device=device,
        grouping=grouping,
        capture=capture,
        tf32=tf32,
        resume=resume,
        quiet=quiet,
    )
    _print(outcomes)
    print(f"recorded in {out}")


def parsed_settings(pairs: list[str]) -> dict[str, str]:
    """What `--set KEY=VALUE` gave, by name."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"expected KEY=VALUE, got {pair!r}", param_hint="--set")
        if name in found:
            raise typer.BadParameter(f"{name} is set twice", param_hint="--set")
        found[name] = value
    return found


def parsed_seeds(text: str) -> list[int]:
    """What `--seeds` gave."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}", param_hint="--seeds") from None


def _print(outcomes: "list[Outcome]") -> None:
    """Every member's shares of whole sequences, last and best, and those of lengths."""
    from rich.table import Table

    from mambakit.cli.console import console

    table = Table("member", "split", "last", "best", "at step", title="sequences with every answer right")
    for outcome in outcomes:
        for split, last in outcome.end["last"].items():
            best = outcome.end["best"][split]["sequence"]
            table.add_row(
                outcome.member.name, split, f"{last['sequence']:.3f}", f"{best['value']:.3f}", str(best["step"])
            )
    console().print(table)
    for outcome in outcomes:
        for line in outcome.lines:
            if line["kind"] == "lengths":
                shares = ", ".join(f"{length}: {found['sequence']:.3f}" for length, found in line["lengths"].items())
                print(f"{outcome.member.name} at lengths {shares}")
