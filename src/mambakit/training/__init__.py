"""The one training loop, its checkpoints, and files that appear whole or not at all.

Names load on first use, so that `mambakit.training.artefacts` and `TrainingConfig` come without accelerate and torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.training.batches import TrainingData as TrainingData
    from mambakit.training.checkpoint import copy_weights as copy_weights
    from mambakit.training.checkpoint import load_weights as load_weights
    from mambakit.training.config import TrainingConfig as TrainingConfig
    from mambakit.training.loop import Objective as Objective
    from mambakit.training.loop import fit as fit
    from mambakit.training.record import TrainingRecord as TrainingRecord

_HOME = {
    "fit": "loop",
    "Objective": "loop",
    "TrainingConfig": "config",
    "TrainingData": "batches",
    "TrainingRecord": "record",
    "copy_weights": "checkpoint",
    "load_weights": "checkpoint",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
