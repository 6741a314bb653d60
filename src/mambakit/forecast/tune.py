"""A search for better settings, with Optuna: tree-structured Parzen estimators, and a median pruner.

A trial trains every symbol with settings of its own and is judged by the mean of their best validation losses after at
least one epoch; the test part is never looked at. A trial that is worse than the median of the earlier ones at the same
epoch is given up. Trials go to a storage that many processes and machines may share, and that a later search goes on
from.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import DataError, MambakitError, TrainingDiverged
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.dataset import prepare_series
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.train import train_network
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import write_json
from mambakit.training.record import EpochEntry

_UNPRUNED_TRIALS = 5  # before the pruner has a median worth the name
_HEARTBEAT_SECONDS = 30  # of a running trial; without one for twice as long it was killed

MODEL_SPACE: dict[str, tuple[int, ...]] = {
    "d_model": (16, 32, 64, 96, 128),
    "d_state": (8, 16, 32),
    "num_layers": (1, 2, 3, 4, 6),
}


@dataclass(frozen=True)
class Tuned:
    """The best settings so far."""

    config: MambaConfig
    training: TrainingConfig
    validation_loss: float  # mean over the symbols
    trial: int
    finished: int  # trials in the storage that came to an end, pruned ones among them
    pruned: int

    def save(self, path: Path) -> None:
        """Write the settings as JSON, which `mambakit forecast train --settings` reads."""
        model, training = self.config.model_dump(mode="json"), self.training.model_dump(mode="json")
        write_json(path, {"model": model, "training": training})


def load_settings(path: Path) -> tuple[MambaConfig, TrainingConfig]:
    """The settings that `Tuned.save` wrote, or such a file written by hand; raises DataError for another file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return MambaConfig.model_validate(saved["model"]), TrainingConfig.model_validate(saved["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValidationError is a ValueError
        reason = " ".join(str(error).split())
        expected = '{"model": {...}, "training": {...}} as `mambakit forecast tune` writes it'
        raise DataError(f"{path}: expected {expected} ({reason})") from error


def tune(
    series: Sequence[PriceSeries],
    config: MambaConfig,
    training: TrainingConfig,
    *,
    trials: int,
    storage: str,
    study: str = "forecast",
    mixers: Sequence[str] = (),
    on_trial: Callable[[int, float | None, Tuned | None], None] = lambda number, loss, best: None,
) -> Tuned:
    """Search until the storage holds `trials` finished trials, and return the best settings.

    Args:
        config, training: the settings that are not searched for; the first trial is these as they are.
        storage: an Optuna storage, such as "sqlite:///tune.sqlite"; an earlier search of this study goes on.
        mixers: to choose from; none keeps that of `config`.
        on_trial: hears of every trial that ended: its number, its loss (None where it was pruned), the best so far.

    Raises:
        MambakitError: Optuna is missing, or the study was made for other symbols or other settings.
    """
    optuna = _import_optuna()
    prepared_symbols = [each.symbol for each in series]
    identity = {
        "symbols": prepared_symbols,
        "data": [each.fingerprint for each in series],
        "mixers": list(mixers),
        "epochs": training.epochs,
        "mode": config.training_mode,
    }
    opened = _open(optuna, storage, study, identity, training.seed)
    optuna.storages.fail_stale_trials(opened)
    if not opened.trials:
        opened.enqueue_trial(_as_parameters(config, training, mixers))

    def objective(trial: Any) -> float:
        chosen, settings = _suggest(trial, config, training, mixers)
        losses: list[float] = []
        for position, each in enumerate(series):
            losses.append(_best_loss(optuna, trial, each, chosen, settings, losses, position))
        return sum(losses) / len(losses)

    def tell(study: Any, trial: Any) -> None:
        on_trial(trial.number, trial.value, _best(optuna, study, config, training))

    while (left := trials - len(_finished(optuna, opened))) > 0:
        opened.optimize(objective, n_trials=min(left, 1), callbacks=[tell], catch=(TrainingDiverged,))
    best = _best(optuna, opened, config, training)
    if best is None:
        raise MambakitError(f"none of {trials} trials came to an end: look at the study {study!r} in {storage}")
    return best


def _best_loss(
    optuna: Any,
    trial: Any,
    series: PriceSeries,
    config: MambaConfig,
    training: TrainingConfig,
    losses: Sequence[float],
    position: int,
) -> float:
    """The best validation loss of one symbol; raises TrialPruned as soon as the trial is not worth going on with."""
    best = float("inf")

    def on_epoch(entry: EpochEntry) -> None:
        nonlocal best
        if entry["epoch"] == 0:
            return  # the untrained network is the same whatever the settings
        best = min(best, float(entry["validation_loss"]))
        trial.report((sum(losses) + best) / (position + 1), position * (training.epochs + 1) + int(entry["epoch"]))
        if trial.should_prune():
            raise optuna.TrialPruned

    train_network(prepare_series(series, config), training, quiet=True, on_epoch=on_epoch)
    return best


def _suggest(
    trial: Any, config: MambaConfig, training: TrainingConfig, mixers: Sequence[str]
) -> tuple[MambaConfig, TrainingConfig]:
    model = {name: trial.suggest_categorical(name, values) for name, values in MODEL_SPACE.items()}
    model["dropout"] = trial.suggest_float("dropout", 0.0, 0.5)
    if mixers:
        model["mixer"] = trial.suggest_categorical("mixer", list(mixers))
    settings = {
        "learning_rate": trial.suggest_float("learning_rate", 5e-5, 5e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.5, log=True),
    }
    return _changed(config, training, model | settings)


def _changed(
    config: MambaConfig, training: TrainingConfig, parameters: dict[str, Any]
) -> tuple[MambaConfig, TrainingConfig]:
    """The settings with a trial's parameters in their places; a size that the mixer lacks keeps its default."""
    mixer = parameters.get("mixer", config.mixer)
    lacking = {"d_state", "d_conv", "expand"} - set(MambaConfig.sizes_of(mixer))
    model = {name: value for name, value in parameters.items() if name in MambaConfig.model_fields}
    defaults = {name: MambaConfig.model_fields[name].default for name in lacking}
    rest = {name: value for name, value in parameters.items() if name in TrainingConfig.model_fields}
    return (
        MambaConfig.model_validate(config.model_dump() | model | defaults),
        TrainingConfig.model_validate(training.model_dump() | rest),
    )


def _as_parameters(config: MambaConfig, training: TrainingConfig, mixers: Sequence[str]) -> dict[str, Any]:
    """The settings as a first trial, as far as they lie in the space that is searched."""
    wanted = {name: getattr(config, name) for name in (*MODEL_SPACE, "dropout")}
    wanted |= {name: getattr(training, name) for name in ("learning_rate", "weight_decay")}
    if config.mixer in mixers:
        wanted["mixer"] = config.mixer
    return {name: value for name, value in wanted.items() if name not in MODEL_SPACE or value in MODEL_SPACE[name]}


def _best(optuna: Any, study: Any, config: MambaConfig, training: TrainingConfig) -> Tuned | None:
    finished = _finished(optuna, study)
    complete = [trial for trial in finished if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        return None
    best = min(complete, key=lambda trial: (trial.value, trial.number))
    settings = _changed(config, training, best.params)
    return Tuned(*settings, best.value, best.number, len(finished), len(finished) - len(complete))


def _finished(optuna: Any, study: Any) -> list[Any]:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in states]


def _open(optuna: Any, storage: str, name: str, identity: dict[str, Any], seed: int) -> Any:
    """The study of this name, new or to go on with."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        engine = optuna.storages.RDBStorage(storage, heartbeat_interval=_HEARTBEAT_SECONDS)
        study = optuna.create_study(
            storage=engine,
            study_name=name,
            direction="minimize",
            load_if_exists=True,
            # Other processes in the same study draw from other seeds, or they would all try the same.
            sampler=optuna.samplers.TPESampler(seed=seed if not _exists(optuna, engine, name) else None),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS),
        )
    except Exception as error:  # each database has errors of its own
        raise MambakitError(f"can't open the storage {storage!r}: {' '.join(str(error).split())}") from error
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_user_attr("identity", identity)
    elif known != identity:
        differing = ", ".join(key for key in identity if known.get(key) != identity[key])
        raise MambakitError(
            f"the study {name!r} in {storage} was made with other {differing}; "
            "choose another --study, or the settings that it was made with"
        )
    return study


def _exists(optuna: Any, storage: Any, name: str) -> bool:
    return name in {summary.study_name for summary in optuna.get_all_study_summaries(storage)}


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MambakitError("the search needs Optuna: pip install 'mambakit[tune]'") from error
    # Its heartbeat, by which a killed trial is known, has been called experimental since 2021.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
