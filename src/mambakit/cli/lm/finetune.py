"""`mambakit lm finetune`: adapters for a stored model."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Adapters from the field `quote` of a JSONL file, stored as PEFT stores them:

  mambakit lm finetune --data quotes.jsonl --field quote --out adapters

Merged into a model of its own, the examples packed:

  mambakit lm finetune --model mamba-130m-hf --data quotes.jsonl --field quote --packing --merge --out tuned
"""


def finetune(
    data: Annotated[Path, typer.Option(help="JSONL, Parquet, or text with an example a line.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapters, or the merged model.")],
    model: Annotated[str, typer.Option(help="Folder of the model, or its name on the hub.")] = "lm-model",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    field: Annotated[str, typer.Option(help="Field of JSONL, column of Parquet.")] = "text",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples behind one step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 8,
    targets: Annotated[str, typer.Option(help="Modules to adapt.")] = "x_proj,embeddings,in_proj,out_proj",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example, or of a pack.")] = 1024,
    packing: Annotated[bool, typer.Option("--packing", help="Several examples in a row, kept apart.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Store a model with the adapters merged into it.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Fixes all randomness.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fine-tune a model by low-rank adapters (LoRA) on examples."""
    from mambakit.cli.lm.extra import require
    from mambakit.errors import DataError

    require("transformers", "peft", "trl", "datasets")
    if learning_rate <= 0:
        raise DataError(f"learning_rate must be above 0, got {learning_rate}")
    from mambakit.lm.finetune import FinetuneSettings, parse_targets, read_examples
    from mambakit.lm.finetune import finetune as run

    settings = FinetuneSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        targets=parse_targets(targets),
        max_length=max_length,
        packing=packing,
        seed=seed,
    )
    if quiet:
        from datasets import disable_progress_bars

        disable_progress_bars()
    found = run(model, read_examples(data, field), field, out, settings, tokenizer=tokenizer, merge=merge, quiet=quiet)
    print(
        f"{found['parameters']:,.0f} parameters trained, loss {found['first_loss']:.4f} at first, "
        f"{found['last_loss']:.4f} at last"
    )
    print(f"stored as {out}" + (", merged" if merge else ""))
