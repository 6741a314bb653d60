"""The causal convolution in plain PyTorch: as many shifted products as there are taps, each over the whole length."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import ConvInputs
from mambakit.ops.packing import sequence_bounds


def forward(inputs: ConvInputs, y: Tensor, final_state: Tensor) -> None:
    """Fill y and the final state."""
    for rows, states in _sequences(inputs):
        history = _history(inputs, rows, states)
        pre = _convolve(history, inputs)
        y[:, rows] = F.silu(pre) if inputs.silu else pre
        final_state[states] = history[:, pre.shape[1] :]


def backward(
    inputs: ConvInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: ConvInputs
) -> None:
    """Fill `grads`."""
    weight = inputs.weight
    width = weight.shape[1]
    grads.weight.zero_()
    if grads.bias is not None:
        grads.bias.zero_()
    for rows, states in _sequences(inputs):
        history = _history(inputs, rows, states)
        grad = grad_y[:, rows].to(weight.dtype)
        length = grad.shape[1]
        if inputs.silu:
            pre = _convolve(history, inputs)
            on = torch.sigmoid(pre)
            grad = grad * on * (1 + pre * (1 - on))
        grad_history = torch.zeros_like(history)
        grad_history[:, length:] = grad_final_state[states]
        for k in range(width):
            grad_history[:, k : k + length] += weight[:, k] * grad
            grads.weight[:, k] += (grad * history[:, k : k + length]).sum((0, 1))
        if grads.bias is not None:
            grads.bias.add_(grad.sum((0, 1)))
        if grads.initial_state is not None:
            grads.initial_state[states] = grad_history[:, : width - 1].to(inputs.x.dtype)
        grads.x[:, rows] = grad_history[:, width - 1 :].to(inputs.x.dtype)


def _sequences(inputs: ConvInputs) -> list[tuple[slice, slice]]:
    """The rows and the states of the whole batch at once, or of each sequence of a pack."""
    if inputs.cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = sequence_bounds(inputs.x.shape[0], inputs.x.shape[1], inputs.cu_seqlens)
    return [(slice(a, b), slice(s, s + 1)) for s, (a, b) in enumerate(itertools.pairwise(bounds))]


def _history(inputs: ConvInputs, rows: slice, states: slice) -> Tensor:
    """The inputs with the width - 1 before them, (batch, width - 1 + length, channels), in the dtype of the weight."""
    x, weight = inputs.x[:, rows], inputs.weight
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    before = before if inputs.initial_state is None else inputs.initial_state[states]
    return torch.cat([before, x], dim=1).to(weight.dtype)


def _convolve(history: Tensor, inputs: ConvInputs) -> Tensor:
    weight = inputs.weight
    width = weight.shape[1]
    length = history.shape[1] - (width - 1)
    y = history.new_zeros(history.shape[0], length, history.shape[2])
    for k in range(width):
        y += weight[:, k] * history[:, k : k + length]
    return y if inputs.bias is None else y + inputs.bias
