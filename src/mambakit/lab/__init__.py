"""The lab: synthetic tasks, models and their ablations, runs that can be repeated, and the mechanisms inside.

Names load on first use.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "MambaForComposite": "models",
    "MambaOnesConv": "models",
    "MambaPosEncoding": "models",
    "MambaWithResidual": "models",
    "TransformerForComposite": "models",
    "initialise": "initialisation",
    "CompositeFunctionDataset": "tasks",
    "CompositeFunctions": "tasks",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
