"""`mambakit lm train`: a model from scratch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambakit.lm.config import MambaConfig
    from mambakit.training import TrainingConfig

EXAMPLES = """
Bytes of a text, twenty minutes:

  mambakit lm train --data shakespeare.txt --minutes 20

A Transformer of the same size, for comparison:

  mambakit lm train --data shakespeare.txt --minutes 20 --mixer attention --out transformer

A hybrid with a tokenizer of 4096 tokens trained on the files:

  mambakit lm train --data a.parquet --data b.txt --tokenizer 4096 --mixer mamba2,mamba2,attention,mamba2

Several processes:

  accelerate launch -m mambakit.cli lm train --data corpus.parquet
"""

_HEAD_CHANNELS = 64  # of an attention, where the width allows


def train(
    data: Annotated[list[Path], typer.Option(help="Text or Parquet file; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("lm-model"),
    validation: Annotated[
        list[Path] | None, typer.Option(help="Files to judge by; by default the last part of the data.")
    ] = None,
    validation_share: Annotated[float, typer.Option(min=0.001, max=0.9, help="How much that part is.")] = 0.1,
    column: Annotated[str, typer.Option(help="Column of Parquet files.")] = "text",
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a number of tokens to train one of, or a folder that has one.")
    ] = "bytes",
    mixer: Annotated[
        str, typer.Option(help="mamba, mamba2, mamba3, attention; or one for each layer, separated by commas.")
    ] = "mamba",
    d_model: Annotated[int, typer.Option(min=8, help="Width.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Blocks; attention alone: half as many, of the same size.")] = 6,
    d_state: Annotated[int | None, typer.Option(min=1, help="State size; by default a good one for the mixer.")] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Share that is dropped in training.")] = 0.1,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data, unless --minutes is given.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="About how long to train, by the time of the first steps.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows behind one step of the optimiser.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="AdamW's decay of the weight matrices.")] = None,
    precision: Annotated[str, typer.Option(help="no or bf16: mixed precision.")] = "no",
    seed: Annotated[int, typer.Option(min=0, help="Fixes all randomness.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was killed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a language model on text, bytes by default, and judge it on the part that it has not seen.

    Stores model and tokenizer as the folder OUT, which transformers opens.
    """
    from mambakit.cli.lm.extra import require

    require("transformers", "tokenizers")
    if epochs is not None and minutes is not None:
        raise typer.BadParameter("give --epochs or --minutes, not both", param_hint="--minutes")
    changes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "mixed_precision": precision,
        "seed": seed,
    }
    training = _training({name: value for name, value in changes.items() if value is not None})

    from mambakit.lm.workflow import Texts, train_and_store

    names = [name.strip() for name in mixer.split(",")]
    if len(names) not in (1, layers):
        layers = len(names)
    texts = Texts(data, validation or (), validation_share, column, tokenizer)
    trained = train_and_store(
        texts,
        out,
        lambda rows: _model(rows, names, d_model, layers, d_state, dropout),
        training,
        context=context,
        minutes=minutes,
        resume=resume,
        quiet=quiet,
    )
    if trained is None:
        return
    record, found = trained.record, trained.held_out
    print(
        f"{mixer}, {trained.parameters:,} parameters, trained in {record.seconds:.0f} s, best epoch {record.best_epoch}"
    )
    print(
        f"held out, {found.text_bytes:,} bytes: {found.nats_per_byte:.4f} nats/byte, {found.bits_per_byte:.4f} "
        f"bits/byte, perplexity {found.perplexity:.3f} a token"
    )
    print(f"stored as {out}")


def _model(
    rows: int, names: list[str], d_model: int, layers: int, d_state: int | None, dropout: float
) -> "MambaConfig":
    from mambakit.lm.config import MambaConfig

    base: dict[str, Any] = {"vocab_size": rows, "hidden_size": d_model, "dropout": dropout}
    kinds = set(names)
    options = {name: _options(name, d_model, d_state) for name in kinds}
    if kinds == {"attention"}:
        if d_state is not None:
            raise typer.BadParameter("attention has no state size", param_hint="--d-state")
        return _transformer(base, options["attention"], layers)
    return MambaConfig(
        **base,
        num_hidden_layers=layers,
        mixer=names[0] if len(kinds) == 1 else names,
        mixer_options=options[names[0]] if len(kinds) == 1 else options,
    )


def _options(name: str, d_model: int, d_state: int | None) -> dict[str, Any]:
    if name == "attention":
        heads = max(1, d_model // _HEAD_CHANNELS)
        return {"n_heads": heads if d_model % heads == 0 else 1}
    defaults = {"mamba": 16, "mamba2": 64, "mamba3": 64, "s4d": 64}
    options: dict[str, Any] = {"d_state": d_state or defaults.get(name, 16)}
    if name in ("mamba2", "mamba3"):
        options["headdim"] = next(size for size in (64, 32, 16, 8, 4, 2, 1) if 2 * d_model % size == 0)
    return options


def _transformer(base: dict[str, Any], options: dict[str, Any], layers: int) -> "MambaConfig":
    """Half as many blocks of attention and MLP, as wide as makes them the size of the default Mamba."""
    import torch

    from mambakit.lm.config import MambaConfig
    from mambakit.lm.model import MambaModel

    def size(config: MambaConfig) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in MambaModel(config).parameters())

    wanted = size(MambaConfig(**base, num_hidden_layers=layers, mixer_options=_options("mamba", 0, None)))
    blocks = max(1, layers // 2)
    own = {**base, "num_hidden_layers": blocks, "mixer": "attention", "mixer_options": options}
    narrow = size(MambaConfig(**own, mlp_size=128))
    a_channel = 3 * base["hidden_size"] * blocks
    # mamba-ssm's MLPs have widths of multiples of 128, and the model is stored in its format.
    width = 128 * max(1, round((wanted - narrow) / a_channel / 128) + 1)
    return MambaConfig(**own, mlp_size=width)


def _training(changes: dict[str, Any]) -> "TrainingConfig":
    from pydantic import ValidationError

    from mambakit.lm.train import LM_TRAINING
    from mambakit.training import TrainingConfig

    try:
        return TrainingConfig.model_validate({**LM_TRAINING.model_dump(), **changes})
    except ValidationError as error:
        problem = error.errors()[0]
        name = {"mixed_precision": "precision"}.get(str(problem["loc"][0]), str(problem["loc"][0]))
        raise typer.BadParameter(
            f"{problem['msg']}, got {problem['input']}", param_hint=f"--{name.replace('_', '-')}"
        ) from error
