"""`mambakit lm eval`: how well and how fast a model reads a text."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambakit.lm.evaluate import Evaluation

EXAMPLES = """
  mambakit lm eval --data other.txt

The last tenth of a file, as `lm train` holds it out:

  mambakit lm eval --data shakespeare.txt --last 0.1 --json

What fewer bits lose:

  mambakit lm eval --data other.txt --weights int8,int4
"""


def evaluate(
    data: Annotated[list[Path], typer.Option(help="Text or Parquet file; may be given several times.")],
    model: Annotated[str, typer.Option(help="Folder of the model, or its name on the hub.")] = "lm-model",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    column: Annotated[str, typer.Option(help="Column of Parquet files.")] = "text",
    last: Annotated[float, typer.Option(min=0.0001, max=1, help="Only the last share of the tokens.")] = 1.0,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens to look back on, as trained: for attention. Without it, all of a document."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the weights.")] = "auto",
    weights: Annotated[
        str | None, typer.Option(help="Any of bfloat16, int8, int4, with commas: store the weights so and compare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Print perplexity, nats and bits by byte, and tokens a second; the state is carried through each document.

    Attention knows no positions beyond those of its training: give such a model its --context.
    """
    import json
    import sys

    from mambakit.cli.lm.extra import require

    require("transformers", "tokenizers")
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from mambakit.errors import DataError
    from mambakit.lm.quantisation import WEIGHTS, weight_bytes
    from mambakit.lm.workflow import evaluate_stored, open_model

    names = [] if weights is None else [name.strip() for name in weights.split(",")]
    if unknown := [name for name in names if name not in WEIGHTS]:
        raise DataError(f"weights must be among {', '.join(WEIGHTS)}, got {unknown[0]!r}")
    compared = ["float32", *(name for name in dict.fromkeys(names) if name != "float32")] if names else [None]
    columns = (TextColumn("{task.completed} tokens"), TimeElapsedColumn())
    disabled = quiet or as_json or not sys.stderr.isatty()
    found: dict[str | None, tuple[Evaluation, int]] = {}  # and the bytes of the weights
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as bar:
        for name in compared:
            task = bar.add_task(f"tokens {name or ''}", total=None)
            network, words = open_model(model, tokenizer, dtype, name)
            if context is None and "attention" in network.config.mixers and not quiet:
                print("note: attention past the context of its training predicts badly; see --context", file=sys.stderr)
            advance = partial(bar.advance, task)
            one = evaluate_stored(network, words, data, column=column, last=last, context=context, on_tokens=advance)
            found[name] = one, weight_bytes(network)
            del network  # before the next is read
    if as_json:
        whole = _numbers(found[compared[0]][0])
        if names:
            whole["weights"] = {
                name: {**_numbers(one), "bytes_of_weights": size} for name, (one, size) in found.items()
            }
        print(json.dumps(whole, indent=2))
        return
    first = found[compared[0]][0]
    print(f"{first.tokens:,} tokens, {first.text_bytes:,} bytes, {first.tokens_per_second:,.0f} tokens/s")
    print(f"perplexity {first.perplexity:.4f} a token ({first.nats_per_token:.4f} nats)")
    print(f"{first.nats_per_byte:.4f} nats/byte, {first.bits_per_byte:.4f} bits/byte")
    if not names:
        return
    print(f"\n{'weights':<10}{'MB':>9}{'perplexity':>13}{'more':>9}{'nats/byte':>11}{'tokens/s':>10}")
    for name, (one, size) in found.items():
        more = one.perplexity / first.perplexity - 1
        print(
            f"{name:<10}{size / 1e6:>9.1f}{one.perplexity:>13.4f}{more:>9.2%}"
            f"{one.nats_per_byte:>11.4f}{one.tokens_per_second:>10,.0f}"
        )


def _numbers(found: "Evaluation") -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "bytes": found.text_bytes,
        "nats_per_token": found.nats_per_token,
        "perplexity": found.perplexity,
        "nats_per_byte": found.nats_per_byte,
        "bits_per_byte": found.bits_per_byte,
        "tokens_per_second": found.tokens_per_second,
    }
