"""The causal depthwise convolution with silu, beside F.conv1d(groups=channels) on its own layout."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Peer, Run
from benchmarks.passes import forward_and_backward, forward_only
from mambakit import ops


class Inputs(NamedTuple):
    """Of one convolution."""

    x: Tensor  # (batch, length, channels)
    weight: Tensor  # (channels, width)
    bias: Tensor  # (channels,)


def cases(batch: int = 4, length: int = 2048, channels: int = 1536, width: int = 4) -> list[Case]:
    """Forward, and forward with backward; the batch is large enough to leave every cache."""
    shape = f"({batch}, {length}, {channels}), width {width}"
    floats = batch * length * channels

    def inputs() -> Inputs:
        torch.manual_seed(0)
        return Inputs(torch.randn(batch, length, channels), torch.randn(channels, width), torch.randn(channels))

    return [
        Case(
            "convolution forward",
            shape,
            inputs,
            lambda i: forward_only(lambda: _ours(i)),
            (Peer("F.conv1d + silu", _forward_of_torch),),
            lambda rates: floors.traffic(rates, 2 * floats),
        ),
        Case(
            "convolution forward + backward",
            shape,
            inputs,
            lambda i: forward_and_backward(lambda: _ours(i), i),
            (Peer("F.conv1d + silu", _backward_of_torch),),
            # x and y; then x, the gradient of y and that of x
            lambda rates: floors.traffic(rates, 5 * floats),
        ),
    ]


def _ours(inputs: Inputs) -> Tensor:
    return cast(Tensor, ops.causal_conv1d(*inputs, activation="silu"))


def _torch(inputs: Inputs) -> Tensor:
    x, weight, bias = inputs  # x (batch, channels, length)
    channels, width = weight.shape
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[-1]])


def _channels_first(inputs: Inputs) -> Inputs:
    """The layout that F.conv1d works on: turning to it and back is not charged to torch."""
    return inputs._replace(x=inputs.x.transpose(1, 2).contiguous())


def _backward_of_torch(inputs: Inputs) -> Run:
    inputs = _channels_first(inputs)
    return forward_and_backward(lambda: _torch(inputs), inputs)


def _forward_of_torch(inputs: Inputs) -> Run:
    inputs = _channels_first(inputs)
    return forward_only(lambda: _torch(inputs))
