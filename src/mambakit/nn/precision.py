"""Parameters that stay in float32 when a model is cast to half precision.

A decay of 0.999 or a step of 1e-3 has no neighbours in bfloat16 that would do: rates, steps and what is added to them
keep float32, as mamba-ssm's checkpoints do.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


class KeepsFloat32(nn.Module):
    """A module whose own parameters `in_float32` are left in float32 by `.to(torch.bfloat16)`, `.half()` and the like.

    Moves to a device and casts to float64 apply to them as to others.
    """

    in_float32: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        named = [parameter for name in self.in_float32 if (parameter := self._parameters.get(name)) is not None]
        kept = {id(tensor) for parameter in named for tensor in (parameter, parameter.grad)}

        def careful(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                return fn(tensor)
            # Asked of an empty tensor, so that no value passes through half precision.
            wanted = fn(tensor.new_empty(0))
            return tensor.to(wanted.device, torch.float32) if wanted.dtype in _HALF else fn(tensor)

        return super()._apply(careful, recurse)
