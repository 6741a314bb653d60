"""An exponential average of the weights along a run: what late steps of a high learning rate shake, it smooths.

    average_n = d_n average_{n-1} + (1 - d_n) weights_n,    d_n = min(decay, (1 + n) / (10 + n))

The decay grows into its value, so that the first steps, which lead far from where they began, are soon forgotten.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """The average of some parameters, which starts as what they are now.

    Args:
        parameters: whose average to keep; the order is that in checkpoints.
        decay: within (0, 1), of a step.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (0, 1, ...) of the run."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are their average within the block, and what they were before after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def copy(self) -> dict[str, Tensor]:
        """The average by position of the parameter, copied to the CPU."""
        return {str(position): tensor.to("cpu", copy=True) for position, tensor in enumerate(self._average)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `copy` returned."""
        for position, tensor in enumerate(self._average):
            tensor.copy_(tensors[str(position)])

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(before)
