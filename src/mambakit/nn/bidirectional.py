"""Two layers that read a sequence from both ends: y = forward(x) + reverse(backward(reverse(x)))."""

from typing import Any

import torch
from torch import Tensor, nn

from mambakit.ops.packing import check_packing


class Bidirectional(nn.Module):
    """The sum of two sequence layers, one of which sees the sequence reversed: `y, _ = both(x)`.

    It needs whole sequences: what the backward layer sees first is what comes last, so there is no state to carry on
    from, and the state returned is None.

    Args:
        forward_layer, backward_layer: sequence layers, `y, state = layer(x, state, cu_seqlens=...)`.
    """

    def __init__(self, forward_layer: nn.Module, backward_layer: nn.Module) -> None:
        super().__init__()
        self.forward_layer, self.backward_layer = forward_layer, backward_layer

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """x and y (batch, length, d_model); with `cu_seqlens` each packed sequence is reversed on its own.

        Raises ValueError when a state is given.
        """
        if state is not None:
            raise ValueError("state must be None: a bidirectional layer needs each sequence whole, in one call")
        check_packing(x.shape[0], cu_seqlens)
        onward, _ = self.forward_layer(x, cu_seqlens=cu_seqlens)
        back, _ = self.backward_layer(_reverse(x, cu_seqlens), cu_seqlens=cu_seqlens)
        return onward + _reverse(back, cu_seqlens), None


def _reverse(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(batch, length, ...) with the steps of each sequence in reverse order."""
    if cu_seqlens is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    sequence = torch.bucketize(steps, cu_seqlens[1:], right=True)  # of every step
    return x[:, cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - steps]
