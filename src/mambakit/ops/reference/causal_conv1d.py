"""The causal depthwise convolution by its definition.

    y_t = activation(bias + sum_k weight_k x_{t - (width - 1) + k})

where x before the sequence is `initial_state`, the last width - 1 inputs of what came before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import ConvInputs
from mambakit.ops.reference.packed import over_sequences


def causal_conv1d(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y (batch, length, channels) and the final state (sequences, width - 1, channels), both in the dtype of x."""
    if inputs.cu_seqlens is not None:
        return over_sequences(causal_conv1d, inputs, along_length=("x",))
    x, weight, bias, before, _, silu = inputs
    batch, length, channels = x.shape
    width = weight.shape[1]
    if before is None:
        before = x.new_zeros(batch, width - 1, channels)
    history = torch.cat([before, x], dim=1)  # (batch, width - 1 + length, channels)
    y = torch.zeros_like(x, dtype=weight.dtype)
    for k in range(width):
        y = y + weight[:, k] * history[:, k : k + length]
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), history[:, length:].clone()
