"""`mambakit lm convert`: a model in another public format."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
  mambakit lm convert mamba-130m mamba-130m-hf --to hf

For mamba-ssm's own loader, in half precision:

  mambakit lm convert lm-model for-mamba-ssm --to state-spaces-bin --dtype bfloat16

For llama.cpp, a byte a weight:

  mambakit lm convert lm-model --to gguf --type q8_0 --out lm-model.gguf
"""


def convert(
    source: Annotated[str, typer.Argument(help="Folder of the model, or its name on the hub.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="The folder, or file, to write.")] = None,
    out: Annotated[Path | None, typer.Option(help="The same by name.")] = None,
    format: Annotated[
        str,
        typer.Option(
            "--to",
            "--format",
            help="hf, state-spaces (safetensors), state-spaces-bin, or gguf: the file of llama.cpp.",
        ),
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the weights.")] = "auto",
    type: Annotated[str | None, typer.Option(help="f32, f16 or q8_0: of the matrices of a gguf.")] = None,
) -> None:
    """Write a model as transformers, mamba-ssm or llama.cpp open it; which format it is in now is found out."""
    from mambakit.cli.lm.extra import require

    require("transformers")
    if (folder is None) == (out is None):
        raise typer.BadParameter("give the name to write as OUT or with --out, one of them", param_hint="OUT")
    target = folder or out
    assert target is not None
    if format != "gguf":
        if type is not None:
            raise typer.BadParameter("--type is of gguf: for other formats give --dtype", param_hint="--type")
        from mambakit.lm.workflow import convert as write

        write(source, target, format, dtype)
        print(f"{target}: {format}")
        return
    if dtype != "auto":
        raise typer.BadParameter("--dtype is of the other formats: for gguf give --type", param_hint="--dtype")
    require("gguf")
    from mambakit.lm.workflow import convert_to_gguf

    type = type or "f32"
    notes = convert_to_gguf(source, target, type)
    print(f"{target}: gguf, {type}, {target.stat().st_size / 1e6:,.1f} MB")
    for note in notes:
        print(note)
