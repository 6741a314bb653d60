"""`mambakit lm bench`: how fast a model is on this machine, beside what the machine allows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambakit.lm.speed import Speed

EXAMPLES = """
  mambakit lm bench lm-model --weights float32,int8

Random weights in the shape of mamba-130m:

  mambakit lm bench --shape mamba-130m --batch 1,8 --json speed.json
"""


def bench(
    model: Annotated[str | None, typer.Argument(help="Folder of the model, or its name on the hub.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="mamba-130m or mamba2-130m, with random weights, in place of a model.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="How they are stored: float32, bfloat16, int8, int4; or several.")
    ] = "float32,bfloat16,int8,int4",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that are read.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are drawn in each turn.")] = 64,
    batch: Annotated[str, typer.Option(help="Rows that advance together; or several numbers.")] = "1,8",
    turns: Annotated[int, typer.Option(min=1, help="Turns, of whose times the medians are shown.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Time to the first token, tokens a second and memory, each beside its floor, measured in the same run."""
    import sys
    from functools import partial

    from mambakit.cli.lm.extra import require

    require("transformers")
    if (model is None) == (shape is None):
        raise typer.BadParameter("give MODEL or --shape, one of them", param_hint="MODEL")
    rows = _numbers(batch)
    import torch
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from mambakit.errors import DataError
    from mambakit.lm.model import MambaForCausalLM
    from mambakit.lm.quantisation import WEIGHTS, quantise
    from mambakit.lm.speed import measure, random_model

    ways = [name.strip() for name in weights.split(",")]
    for way in ways:
        if way not in WEIGHTS:
            raise DataError(f"weights must be one of {', '.join(WEIGHTS)}, got {way!r}")

    def make(way: str) -> MambaForCausalLM:
        if shape is not None:
            return quantise(random_model(shape), way)
        return MambaForCausalLM.from_pretrained(str(model), weights=way)

    found: list[Speed] = []
    columns = (TextColumn("{task.description}"), TextColumn("turn {task.completed}"), TimeElapsedColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()
    ) as bar:
        for way in ways:
            for count in rows:
                task = bar.add_task(f"{way}, batch {count}", total=turns + 1)
                found.append(
                    measure(
                        partial(make, way),
                        way,
                        count,
                        prompt=prompt,
                        new_tokens=new_tokens,
                        turns=turns,
                        on_turn=partial(bar.advance, task),
                    )
                )
    name = f"{shape}, random weights" if shape is not None else str(model)
    print(
        f"{name}: a prompt of {prompt}, {new_tokens} tokens drawn, {torch.get_num_threads()} threads, "
        f"memory read at {max(speed.read_rate for speed in found) / 1e9:.1f} GB/s"
    )
    Console(width=None if sys.stdout.isatty() else 130).print(_table(found))
    if json_file is not None:
        from mambakit.training.artefacts import write_json

        write_json(json_file, {"model": name, "threads": torch.get_num_threads(), "runs": [s.record() for s in found]})


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}", param_hint="--batch") from error
    if min(numbers) < 1:
        raise typer.BadParameter(f"must be at least 1, got {min(numbers)}", param_hint="--batch")
    return numbers


def _table(found: "list[Speed]") -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights")
    headings = ("batch", "MB read a step", "first token ms", "prompt tokens/s", "of its products' time")
    for heading in (*headings, "tokens/s", "reading allows", "share", "peak MB"):
        table.add_column(heading, justify="right")
    for speed in found:
        table.add_row(
            speed.weights,
            str(speed.batch),
            f"{speed.weight_bytes / 1e6:,.1f}",
            f"{1e3 * speed.first_token_seconds:,.1f}",
            f"{speed.prompt_tokens_per_second:,.0f}",
            f"{speed.over_products:.2f}x",
            f"{speed.tokens_per_second:,.1f}",
            f"{speed.bound_tokens_per_second:,.1f}",
            f"{speed.share_of_bound:.0%}",
            "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e6:,.0f}",
        )
    return table
