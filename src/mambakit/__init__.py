"""Selective state-space models (Mamba) that install anywhere and are fast on the machine you have.

`mambakit.ops` holds the operations, `mambakit.nn` the layers, `mambakit.training` the training loop,
`mambakit.forecast` multi-horizon price forecasting and `mambakit.stream` step-by-step prediction. Importing `mambakit`
imports torch and nothing heavier: each room loads what it needs when it is first used.
"""

import importlib
import os
from types import ModuleType

# Threads that wait for one another soon sleep instead of spinning: on a machine that is busy with other work, a pool
# that spins takes thirty times as long. It counts only where torch is not loaded yet, and the user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Imported first so that the extension finds torch's OpenMP runtime already loaded and shares its threads.
import torch  # noqa: F401

__version__ = "0.1.0"

_ROOMS = ("ops", "nn", "training", "export", "forecast", "stream", "compat", "cli")


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"mambakit.{name}")
    raise AttributeError(f"module 'mambakit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
