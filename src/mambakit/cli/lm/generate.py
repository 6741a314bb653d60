"""`mambakit lm generate`: text that goes on from a prompt, as it is made."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
  mambakit lm generate "ROMEO:" --temperature 0.8 --seed 1

The likeliest text, up to the next blank line:

  mambakit lm generate "ROMEO:" --temperature 0 --stop "\\n\\n"

A long text read once, and questions asked of its state:

  mambakit lm generate --prompt-file book.txt --max-new-tokens 0 --save-state book.state

  mambakit lm generate "The end is" --state book.state

Faster, from weights of 8 bits:

  mambakit lm generate "ROMEO:" --weights int8
"""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file that holds it.")] = None,
    model: Annotated[str, typer.Option(help="Folder of the model, or its name on the hub.")] = "lm-model",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among those that have this share together.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Fixes the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; \\n is a line's end.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are read at a time.")] = 2048,
    state: Annotated[Path | None, typer.Option(help="Go on from a state that was saved.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state at the end.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the weights.")] = "auto",
    weights: Annotated[
        str | None, typer.Option(help="bfloat16, int8 or int4: store the weights so, and compute in float32.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Print the text that follows a prompt."""
    import sys
    import time

    from mambakit.cli.lm.extra import require
    from mambakit.errors import DataError

    require("transformers", "tokenizers")
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give the prompt or --prompt-file, one of them", param_hint="PROMPT")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{prompt_file} is not UTF-8: convert it first") from error
    assert prompt is not None
    from mambakit.lm import Decoder, Sampling, StateCache, generate_text
    from mambakit.lm.workflow import open_model

    sampling = Sampling(temperature, top_k, top_p, seed)
    network, words = open_model(model, tokenizer, dtype, weights)
    decoder = Decoder(network, chunk=chunk)
    if state is not None:
        decoder.load(StateCache.load(state, network))
    before = decoder.length
    stops = [string.replace("\\n", "\n") for string in stop or []]
    if state is None and not quiet:
        print(prompt, end="", flush=True)
    started = time.perf_counter()
    for piece in generate_text(decoder, words, prompt, max_new_tokens, sampling, stop=stops):
        print(piece, end="", flush=True)
    print()
    if save_state is not None:
        decoder.cache().save(save_state)
    if not quiet:
        seconds = time.perf_counter() - started
        print(f"{decoder.length - before} tokens read and made in {seconds:.2f} s", file=sys.stderr)
