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
    from mambakit.lm.generation import Decoder as Decoder
    from mambakit.lm.generation import Sampling as Sampling
    from mambakit.lm.generation import generate_text as generate_text
    from mambakit.lm.model import MambaForCausalLM as MambaForCausalLM
    from mambakit.lm.model import MambaModel as MambaModel
    from mambakit.lm.quantisation import quantise as quantise
    from mambakit.lm.tokenizers import byte_tokenizer as byte_tokenizer
    from mambakit.lm.tokenizers import load_tokenizer as load_tokenizer
    from mambakit.lm.tokenizers import train_tokenizer as train_tokenizer

_HOME = {
    "MambaConfig": "config",
    "MambaModel": "model",
    "MambaForCausalLM": "model",
    "StateCache": "cache",
    "Decoder": "generation",
    "Sampling": "generation",
    "generate_text": "generation",
    "quantise": "quantisation",
    "byte_tokenizer": "tokenizers",
    "train_tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
