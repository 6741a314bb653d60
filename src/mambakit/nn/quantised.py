"""Layers whose weights are stored in fewer bits, for inference: see `mambakit.ops.quantised_linear` for the formats."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from mambakit import ops
from mambakit.ops.quantised_linear import QuantisedMatrix


class _Quantised(nn.Module):
    """A matrix in buffers, which `.to` moves to another device and never casts."""

    values: Tensor
    scales: Tensor | None

    def __init__(self, matrix: QuantisedMatrix) -> None:
        super().__init__()
        self.register_buffer("values", matrix.values)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> QuantisedMatrix:
        """The weight."""
        return QuantisedMatrix(self.values, self.scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    def extra_repr(self) -> str:
        return f"{self.matrix.columns} to {self.values.shape[0]}, {self.values.dtype}"


class QuantisedLinear(_Quantised):
    """A linear layer of a quantised matrix (out, in).

    Args:
        matrix: the weight.
        bias: (out,), or None.
    """

    bias: Tensor | None

    def __init__(self, matrix: QuantisedMatrix, bias: Tensor | None = None) -> None:
        super().__init__(matrix)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        return ops.quantised_linear(input, self.matrix, self.bias)


class QuantisedEmbedding(_Quantised):
    """An embedding of a quantised matrix (tokens, width); what it gives is float32."""

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix.rows(input)
