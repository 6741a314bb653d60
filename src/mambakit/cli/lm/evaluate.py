"""`mambakit lm eval`: how well and how fast a model reads a text."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
  mambakit lm eval --data other.txt

The last tenth of a file, as `lm train` holds it out:

  mambakit lm eval --data shakespeare.txt --last 0.1 --json
"""


def evaluate(
    data: Annotated[list[Path], typer.Option(help="Text or Parquet file; may be given several times.")],
    model: Annotated[str, typer.Option(help="Folder of the model, or its name on the hub.")] = "lm-model",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    column: Annotated[str, typer.Option(help="Column of Parquet files.")] = "text",
    last: Annotated[float, typer.Option(min=0.0001, max=1, help="Only the last share of the tokens.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the weights.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Print perplexity, nats and bits by byte, and tokens a second; the state is carried through each document."""
    import json
    import sys

    from mambakit.cli.lm.extra import require

    require("transformers", "tokenizers")
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from mambakit.lm.workflow import evaluate_stored, open_model

    network, words = open_model(model, tokenizer, dtype)
    columns = (TextColumn("{task.completed} tokens"), TimeElapsedColumn())
    disabled = quiet or as_json or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as bar:
        task = bar.add_task("tokens", total=None)
        found = evaluate_stored(
            network, words, data, column=column, last=last, on_tokens=lambda n: bar.advance(task, n)
        )
    numbers = {
        "tokens": found.tokens,
        "bytes": found.text_bytes,
        "nats_per_token": found.nats_per_token,
        "perplexity": found.perplexity,
        "nats_per_byte": found.nats_per_byte,
        "bits_per_byte": found.bits_per_byte,
        "tokens_per_second": found.tokens_per_second,
    }
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    print(f"{found.tokens:,} tokens, {found.text_bytes:,} bytes, {found.tokens_per_second:,.0f} tokens/s")
    print(f"perplexity {found.perplexity:.4f} a token ({found.nats_per_token:.4f} nats)")
    print(f"{found.nats_per_byte:.4f} nats/byte, {found.bits_per_byte:.4f} bits/byte")
