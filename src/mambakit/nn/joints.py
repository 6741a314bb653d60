"""Whether modules are as they were made: what was put into their joints must not be passed by.

Steps that are taken in fewer calls than there are modules read the modules' weights and call none of them.
"""

import torch
from torch import nn

from mambakit.nn.linear import Linear
from mambakit.ops import decode

_MOST_ROWS = {2: 64, 4: 4}  # by the bytes of a weight; from there on torch's products are faster than those of a step
_FEW_ROWS = 3  # up to which they are not where a norm stands before, or where there are many channels
_WIDE = 2048  # channels
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
    most = _MOST_ROWS.get(weight.element_size(), 0)
    if after_norm or weight.shape[1] > _WIDE:
        most = min(most, _FEW_ROWS)
    return (
        rows <= most
        and weight.is_contiguous()
        and 0 < weight.shape[1] <= _WIDEST
        # Channels meet the norm's weight before its divisor: a large residual would leave the range of float16.
        and not (after_norm and weight.dtype == torch.float16)
    )


def added_product(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual + layer(x) for one step on a GPU, in one launch where that is faster; (batch, outputs)."""
    if not product_of_a_step(layer, x.shape[0]):
        return residual + layer(x)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
    return decode.linear(x, weight, bias, residual=residual, dtype=residual.dtype)
