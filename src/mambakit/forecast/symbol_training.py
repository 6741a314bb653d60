"""One call that trains one symbol: prices, checks, training, judgement, and the stored version."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from mambakit.errors import DataError
from mambakit.forecast.config import MambaConfig, default_training
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.prices import PriceSeries, fetch_historical_prices, parse_symbol
from mambakit.forecast.registry import ModelRegistry
from mambakit.forecast.workflow import train_and_store
from mambakit.training import TrainingConfig

# The randomness and the threads of torch belong to the process, so trainings in it take turns.
_ONE_AT_A_TIME = threading.Lock()


async def train_single_symbol(
    symbol: str,
    epochs: int = 50,
    batch_size: int | None = None,
    config: MambaConfig | None = None,
    historical_days: int | None = None,
    *,
    prices: PriceSeries | None = None,
    models: str | Path = "models",
    seed: int = 0,
    quiet: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Train a model of a symbol, store it as the next version, and return the symbol and what came of it.

    The work is done in a thread, so that an event loop goes on meanwhile; several such calls take turns.

    Args:
        epochs: passes over the training part, at most.
        batch_size: samples behind one step of the optimiser: windows, or runs of days for sequences. By default what
            suits the configuration's mode.
        config: the model's; the default one where not given.
        historical_days: use the last so many days.
        prices: the series to learn from; the built-in one of the symbol where not given.
        models: the folder to store the model in.
        seed: fixes all randomness.
        quiet: no progress.

    Returns:
        The symbol, and a dict with best_val_loss, best_epoch, total_epochs, training_time (seconds), version, path,
        and evaluation (see `mambakit.forecast.Evaluation`).

    Raises:
        DataError: no such prices, or none that can be trained on.
        TrainingDiverged: the loss stopped being finite.
    """
    name = parse_symbol(symbol)
    model = MambaConfig() if config is None else config
    changes: dict[str, int] = {"epochs": epochs, "seed": seed}
    if batch_size is not None:
        changes["batch_size"] = batch_size
    settings = TrainingConfig.model_validate(default_training(model.training_mode).model_dump() | changes)
    series = fetch_historical_prices([name])[name] if prices is None else prices
    if series.symbol != name:
        raise DataError(f"the prices of {series.symbol} were given for {name}")
    if historical_days is not None:
        series = series.last(historical_days)
    return name, await asyncio.to_thread(_train, series, model, settings, ModelRegistry(models), quiet)


def _train(
    series: PriceSeries, config: MambaConfig, settings: TrainingConfig, registry: ModelRegistry, quiet: bool
) -> dict[str, Any]:
    with _ONE_AT_A_TIME:
        registry.require_writable(series.symbol)
        outcome = train_and_store(prepare_series(series, config), settings, registry, quiet=quiet)
    return {
        "best_val_loss": outcome.record.best_validation_loss,
        "best_epoch": outcome.record.best_epoch,
        "total_epochs": int(outcome.record.history[-1]["epoch"]),
        "training_time": outcome.record.seconds,
        "version": outcome.version,
        "path": registry.folder(outcome.symbol) / outcome.version,
        "evaluation": outcome.evaluation,
    }
