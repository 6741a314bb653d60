"""`mambakit lm convert`: a model in another public format."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
  mambakit lm convert mamba-130m mamba-130m-hf --format hf

For mamba-ssm's own loader, in half precision:

  mambakit lm convert lm-model for-mamba-ssm --format state-spaces-bin --dtype bfloat16
"""


def convert(
    source: Annotated[str, typer.Argument(help="Folder of the model, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="hf, state-spaces (safetensors) or state-spaces-bin.")] = "hf",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the weights.")] = "auto",
) -> None:
    """Write a model as transformers or mamba-ssm open it; which format it is in now is found out."""
    from mambakit.cli.lm.extra import require

    require("transformers")
    from mambakit.lm.workflow import convert as write

    write(source, out, format, dtype)
    print(f"{out}: {format}")
