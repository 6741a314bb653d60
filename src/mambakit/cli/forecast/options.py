"""What several commands read alike: symbols, sources, and the settings of a model and its training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mambakit.forecast.config import MambaConfig
    from mambakit.training import TrainingConfig

SYMBOLS_HELP = "Symbols, such as AAPL,IBM; TIER_1 for fifty large US shares; @FILE for a list in a file."
SOURCE_HELP = "Where prices come from: builtin, skfolio, yahoo, or a folder or file of CSV or Parquet."

Source = Annotated[str, typer.Option(help=SOURCE_HELP)]
Days = Annotated[int | None, typer.Option(min=1, help="Use the last so many days; all by default.")]
Models = Annotated[Path, typer.Option(help="Folder with the models.")]
Seed = Annotated[int, typer.Option(min=0, help="Fixes all randomness.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no explanations.")]
Preset = Annotated[str, typer.Option(help="Sizes and settings: default, small, large or high-variance.")]
Mixer = Annotated[str | None, typer.Option(help="mamba, mamba2, mamba3, s4d or attention.")]
Mode = Annotated[
    str | None,
    typer.Option(help="sequence: learn from every day, read once; windows: from the last day of each window."),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the training part, at most.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows, or runs of 125 days, behind one step of the optimiser.")
]
DModel = Annotated[int | None, typer.Option(min=1, help="Width of the model.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Blocks.")]
LearningRate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
Patience = Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without progress.")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="A file that `forecast tune` wrote.")]

# What an option is called that sets a field of another name.
_OPTIONS = {
    "num_layers": "--layers",
    "training_mode": "--mode",
    "mixed_precision": "--precision",
    "gradient_accumulation": "--accumulate",
}


def parsed_symbols(symbols: str) -> tuple[str, ...]:
    """The symbols that an option names; a usage error where it names none."""
    from mambakit.errors import DataError
    from mambakit.forecast.symbols import parse_symbols

    try:
        return parse_symbols(symbols)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--symbols") from error


def settings(
    preset: str,
    model: dict[str, Any],
    training: dict[str, Any],
    *,
    file: Path | None = None,
    pooled: bool = False,
) -> "tuple[MambaConfig, TrainingConfig]":
    """Both configurations from a preset or a file, and options, those that are None left out.

    What only the configurations can judge becomes a usage error that names the option.
    """
    from pydantic import ValidationError

    from mambakit.forecast.config import PRESETS, MambaConfig, default_training, pooled_training
    from mambakit.training import TrainingConfig

    if preset not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, got {preset}", param_hint="--preset")
    sizes = {name: value for name, value in model.items() if value is not None}
    given = {name: value for name, value in training.items() if value is not None}
    if given.get("clip_norm") == 0:
        given["clip_norm"] = None
    try:
        if file is None:
            config = MambaConfig.preset(preset, **sizes)
            default = (pooled_training if pooled else default_training)(config.training_mode, preset)
        else:
            from mambakit.forecast.tune import load_settings

            read, default = load_settings(file)
            config = MambaConfig.model_validate(read.model_dump() | sizes)
        return config, TrainingConfig.model_validate({**default.model_dump(), **given})
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0]) if problem["loc"] else ""
        option = _OPTIONS.get(field, "--" + field.replace("_", "-")) if field else "--mixer"
        got = f", got {problem['input']}" if field else ""
        raise typer.BadParameter(f"{problem['msg']}{got}", param_hint=option) from error


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show what there is to know about prices as one line, without the place in the code."""
    from mambakit.forecast.prices import PriceWarning

    usual = warnings.formatwarning

    def format_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if not issubclass(category, PriceWarning):
            return usual(message, category, *place, **more)
        return f"mambakit: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = usual
