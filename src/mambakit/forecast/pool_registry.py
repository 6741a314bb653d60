"""Where pooled models live, and how one is served.

They stand beside the models of single symbols, in a folder whose name no symbol can have:

<root>/pooled-models/POOLED/v1/{config.json, model.safetensors, ...}
<root>/pooled-models/POOLED/aliases.json
"""

from dataclasses import replace
from pathlib import Path

from mambakit.errors import ArtefactError
from mambakit.forecast.artefact import SavedForecaster, load_forecaster
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.registry import PRODUCTION, ModelRegistry
from mambakit.training.artefacts import read_json

POOLED = "POOLED"  # what a pooled model goes by where one of a single symbol has its symbol
_FOLDER = "pooled-models"


def pooled_registry(root: str | Path) -> ModelRegistry:
    """The registry of the pooled models below a root folder of models."""
    return ModelRegistry(Path(root) / _FOLDER)


def resolve_pooled(root: str | Path, version: str = PRODUCTION) -> str:
    """The name of a version of the pooled model, or of what an alias stands for; raises ArtefactError without one."""
    registry = pooled_registry(root)
    if not registry.versions(POOLED):
        raise ArtefactError(
            f"no pooled model in {root}; "
            f"train one with: mambakit forecast train --pooled --symbols AAPL,MSFT --out {root}"
        )
    return registry.resolve(POOLED, version)


def load_pooled(root: str | Path, symbol: str, version: str = PRODUCTION) -> SavedForecaster:
    """A version or alias of the pooled model, to forecast one symbol with, which it need not have met.

    Its evaluation is that of the symbol, and one without any score where the model has not met it. Raises
    ArtefactError where there is no such model.
    """
    folder = pooled_registry(root).find(POOLED, resolve_pooled(root, version))
    saved = load_forecaster(folder)
    tests = read_json(folder / "metrics.json")["tests"]
    evaluation = Evaluation.from_json(tests[symbol]) if symbol in tests else Evaluation(symbol, (), (), {})
    stats = saved.metadata["data_stats"]
    # How far the data reached that a forecast of this symbol rests on: its own, or that of all.
    reached = max(own["last_day"] for name, own in stats.items() if name == symbol or symbol not in stats)
    metadata = saved.metadata | {"data_stats": {**stats, "last_day": reached}}
    return replace(saved, symbol=symbol, evaluation=evaluation, metadata=metadata)
