"""What every launch shares: the device that it goes to, blocks of channels, and strides that loads may rely on."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return 1 << (max(number, least, 1) - 1).bit_length()


def stride_divisor(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides, in elements.

    Kernels take strides unspecialised, so that no change of a length compiles them anew, and this divisor for the
    alignment of loads.
    """
    divisor = 16
    while any(stride % divisor for stride in strides):
        divisor //= 2
    return divisor


def rows_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` with neighbouring elements along its last axis; copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
