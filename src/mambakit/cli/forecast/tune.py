"""`mambakit forecast tune`: search for better settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mambakit.cli.forecast.options import (
    SYMBOLS_HELP,
    Days,
    Epochs,
    Mode,
    Preset,
    Quiet,
    Seed,
    Source,
    parsed_symbols,
    plain_warnings,
    settings,
)

if TYPE_CHECKING:
    from mambakit.forecast.tune import Tuned

EXAMPLES = """
Thirty trials on two symbols, then a training with the best settings:

  mambakit forecast tune --symbols AAPL,IBM --trials 30 --out best.json
  mambakit forecast train --symbols AAPL,IBM --settings best.json

Go on to fifty, or help from a second terminal: the same command, with the same storage:

  mambakit forecast tune --symbols AAPL,IBM --trials 50 --out best.json
"""


def tune(
    symbols: Annotated[str, typer.Option(help=SYMBOLS_HELP)],
    source: Source = "builtin",
    days: Days = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in the study, those of earlier searches counted.")] = 20,
    mixers: Annotated[str | None, typer.Option(help="Mixers to choose from, such as mamba,mamba2.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="An Optuna storage to share; by default the file OUT with .sqlite added.")
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "forecast",
    preset: Preset = "default",
    mode: Mode = None,
    epochs: Epochs = None,
    out: Annotated[Path, typer.Option(help="File for the best settings.")] = Path("best.json"),
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Search sizes, dropout, learning rate and weight decay by the mean validation loss of the symbols.

    The test part is not looked at. A search that was stopped goes on where it was.
    """
    chosen = tuple(name.strip() for name in (mixers or "").split(",") if name.strip())
    config, training = settings(preset, {"training_mode": mode}, {"epochs": epochs, "seed": seed})
    for name in chosen:
        settings(preset, {"training_mode": mode, "mixer": name}, {})  # a name that is none is found here
    from mambakit.forecast.prices import fetch_historical_prices
    from mambakit.forecast.sources import open_source
    from mambakit.forecast.tune import tune as search

    asked = parsed_symbols(symbols)
    with plain_warnings():
        series = list(fetch_historical_prices(asked, days, source=open_source(source, progress=not quiet)).values())

    def tell(number: int, loss: float | None, best: "Tuned | None") -> None:
        if not quiet:
            ended = "given up" if loss is None else f"validation {loss:.4f}"
            so_far = "" if best is None else f", best {best.validation_loss:.4f} (trial {best.trial})"
            print(f"trial {number}: {ended}{so_far}", flush=True)

    best = search(
        series,
        config,
        training,
        trials=trials,
        storage=f"sqlite:///{out}.sqlite" if storage is None else storage,
        study=study,
        mixers=chosen,
        on_trial=tell,
    )
    best.save(out)
    print(
        f"Best of {best.finished} trials ({best.pruned} given up early): trial {best.trial}, "
        f"validation {best.validation_loss:.4f}"
    )
    print(f"Stored as {out}; train with: mambakit forecast train --symbols {symbols} --settings {out}")
