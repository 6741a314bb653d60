"""The causal convolution on the compiled backend; native/causal_conv1d.cpp says how it works."""

from typing import Any

import torch
from torch import Tensor

from mambakit.ops.cpu import native, pack_bounds, rows, whole
from mambakit.ops.inputs import ConvInputs


def forward(inputs: ConvInputs, y: Tensor, final_state: Tensor) -> None:
    """Fill y and the final state."""
    native.convolution(*_views(inputs), *_settings(inputs), y, final_state)


def backward(
    inputs: ConvInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: ConvInputs
) -> None:
    """Fill `grads`."""
    native.convolution_backward(*_views(inputs), *_settings(inputs), rows(grad_y), whole(grad_final_state), *grads[:4])


def _views(inputs: ConvInputs) -> tuple[Tensor | None, ...]:
    return rows(inputs.x), whole(inputs.weight), whole(inputs.bias), whole(inputs.initial_state)


def _settings(inputs: ConvInputs) -> tuple[Any, ...]:
    return pack_bounds(inputs.x, inputs.cu_seqlens), inputs.silu, torch.get_num_threads()
