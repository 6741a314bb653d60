"""Language models: Mamba-1, -2, -3 and hybrids, at home in transformers.

config, model   the network and its settings           formats/    the public checkpoints, as mappings
checkpoint      folders of weights, read and written    packing     padding and documents
cache           what was read so far
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.lm.cache import StateCache as StateCache
    from mambakit.lm.config import MambaConfig as MambaConfig
    from mambakit.lm.model import MambaForCausalLM as MambaForCausalLM
    from mambakit.lm.model import MambaModel as MambaModel

_HOME = {
    "MambaConfig": "config",
    "MambaModel": "model",
    "MambaForCausalLM": "model",
    "StateCache": "cache",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
