"""The cross entropy on the GPU: a row of logits is read once forwards and once backwards, in the dtype that it has.

A program takes one row; forwards it keeps the running maximum m and the sum of exp(logit - m). The logarithm of the
sum of exponentials is all that the backward needs beside the logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton.counting import power_of_two
from mambakit.ops.triton.launch import on_device_of, stride_divisor

_BLOCK = 4096


def forward(logits: Tensor, targets: Tensor, ignore_index: int, losses: Tensor, log_sums: Tensor) -> None:
    """Fill, for logits (rows, classes), the losses (rows,), zero where ignored, and log sum exp of each row."""
    rows, classes = logits.shape
    with on_device_of(logits):
        if rows:
            _forward[(rows,)](
                logits, targets, losses, log_sums, ignore_index, *_row(logits), CLASSES=classes, **_block(classes)
            )


def backward(logits: Tensor, targets: Tensor, ignore_index: int, log_sums: Tensor, scale: Tensor, grad: Tensor) -> None:
    """Fill the gradient (rows, classes) of the sum of losses times `scale`, one number."""
    rows, classes = logits.shape
    with on_device_of(logits):
        if rows:
            _backward[(rows,)](
                logits, targets, log_sums, scale, grad, ignore_index, *_row(logits), CLASSES=classes, **_block(classes)
            )


def _row(logits: Tensor) -> tuple[int, int]:
    return logits.stride(0), stride_divisor(logits.stride(0), logits.shape[1])


def _block(classes: int) -> dict[str, int]:
    return {"BLOCK": min(_BLOCK, power_of_two(classes)), "num_warps": 8}


@triton.jit(do_not_specialize=["ignore_index", "row_stride"])
def _forward(
    logits,
    targets,
    losses,
    log_sums,
    ignore_index,
    row_stride,
    DIVISOR: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += tl.multiple_of(row * row_stride, DIVISOR)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, CLASSES, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < CLASSES, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, value)
        # Lanes that have seen nothing, or -inf alone, have no sum to rescale; a NaN stays one.
        total = tl.where(above == float("-inf"), 0.0, total * tl.exp(highest - above) + tl.exp(value - above))
        highest = above
    most = tl.max(highest, axis=0)
    log_sum = most + tl.log(tl.sum(total * tl.exp(highest - most), axis=0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < CLASSES)
    chosen = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)
    loss = tl.where(known, log_sum - chosen, float("nan"))  # of a class that does not exist
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(log_sums + row, log_sum)


@triton.jit(do_not_specialize=["ignore_index", "row_stride"])
def _backward(
    logits,
    targets,
    log_sums,
    scale,
    grad,
    ignore_index,
    row_stride,
    DIVISOR: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += tl.multiple_of(row * row_stride, DIVISOR)
    grad += tl.multiple_of(row * CLASSES, DIVISOR)
    target, log_sum = tl.load(targets + row), tl.load(log_sums + row)
    ignored = target == ignore_index
    factor = tl.load(scale).to(tl.float32)
    for first in range(0, CLASSES, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < CLASSES, other=0.0).to(tl.float32)
        slope = (tl.exp(value - log_sum) - tl.where(at == target, 1.0, 0.0)) * factor
        slope = tl.where(ignored, 0.0, slope)
        tl.store(grad + at, slope.to(grad.dtype.element_ty), mask=at < CLASSES)
