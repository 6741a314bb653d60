"""Whether modules are as they were made: what was put into their joints must not be passed by.

Steps that are taken in fewer calls than there are modules read the modules' weights and call none of them.
"""

import torch
from torch import nn

from mambakit.nn.linear import Linear

_MOST_ROWS = {2: 64, 4: 4}  # by the bytes of a weight; from there on torch's products are faster than those of a step
_WIDEST = 16384  # channels of a row, which a program holds whole


def as_built(mixer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `mixer` is of exactly this kind and keeps all of its methods."""
    return type(mixer) is kind and not any(callable(getattr(kind, name, None)) for name in mixer.__dict__)


def has_hooks(*modules: nn.Module | None) -> bool:
    """Whether calling any of the modules would call something else as well."""
    return any(module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules)


def product_of_a_step(layer: nn.Module, rows: int, *, after_norm: bool = False) -> bool:
    """Whether `mambakit.ops.decode.linear` does what `layer` does to so many vectors, and does it faster.

    Args:
        layer: what may be a linear layer.
        rows: vectors.
        after_norm: whether a norm stands before it, which is to be taken in the same call.
    """
    if type(layer) not in (nn.Linear, Linear) or has_hooks(layer):
        return False
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return (
        rows <= _MOST_ROWS.get(weight.element_size(), 0)
        and weight.is_contiguous()
        and 0 < weight.shape[1] <= _WIDEST
        # Channels meet the norm's weight before its divisor: a large residual would leave the range of float16.
        and not (after_norm and weight.dtype == torch.float16)
    )
