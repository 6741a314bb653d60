"""What the steps of Mamba-3 weigh, in one kernel each way.

steps = softplus(dt + dt_bias),   log_decay = steps A,   own = sigmoid(trap) steps
scale_t = own_t + (1 - sigmoid(trap_{t+1})) steps_{t+1}, the second term 0 at the end of a sequence
speeds = pi tanh(angles)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from mambakit.ops.triton import interpreting
from mambakit.ops.triton.counting import ceil_div
from mambakit.ops.triton.launch import Kernel, on_device_of

PI = tl.constexpr(3.141592653589793)
_BLOCK = 1024


def forward(
    dt: Tensor, dt_bias: Tensor | None, A: Tensor, trap: Tensor, angles: Tensor, ends: Tensor | None, softplus: bool
) -> tuple[Tensor, ...]:
    """log_decay, scale, own and steps (batch, length, heads), and speeds, all in float32, from any dtype.

    Args:
        dt, A, trap: (batch, length, heads); dt_bias: (heads,); angles: any shape; all contiguous.
        ends: (batch * length,), whether a row is the last of its sequence; None where that is the end of the length.
        softplus: whether steps go through it.
    """
    weights = [torch.empty_like(dt, dtype=torch.float32) for _ in range(4)]  # an operator's results share no memory
    speeds = torch.empty_like(angles, dtype=torch.float32)
    programs = ceil_div(dt.numel(), _BLOCK)
    if programs + angles.numel():
        with on_device_of(dt):
            _forward[(programs + ceil_div(angles.numel(), _BLOCK),)](
                dt, dt_bias, A, trap, angles, ends, *weights, speeds,
                dt.numel(), angles.numel(), programs, *dt.shape[1:],
                SOFTPLUS=softplus, FAST=not interpreting(), BLOCK=_BLOCK,
            )  # fmt: skip
    return (*weights, speeds)


def backward(
    dt: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    ends: Tensor | None,
    softplus: bool,
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of dt, A, trap and angles, from those of the outputs of `forward`, contiguous or None."""
    found = [torch.empty_like(t) for t in (dt, A, trap, angles)]
    programs = ceil_div(dt.numel(), _BLOCK)
    if programs + angles.numel():
        with on_device_of(dt):
            _backward[(programs + ceil_div(angles.numel(), _BLOCK),)](
                dt, dt_bias, A, trap, angles, ends, *grads, *found,
                dt.numel(), angles.numel(), programs, *dt.shape[1:],
                SOFTPLUS=softplus, FAST=not interpreting(), BLOCK=_BLOCK,
            )  # fmt: skip
    return found[0], found[1], found[2], found[3]


@triton.jit
def _steps(dt, dt_bias, at, there, heads, SOFTPLUS: tl.constexpr):
    """The steps and their derivative."""
    raw = tl.load(dt + at, mask=there, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + at % heads, mask=there, other=0.0)
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        grown = tl.exp(tl.minimum(raw, 20.0))
        above = 1 + grown  # log1p: what rounding took off 1 + grown is put back as a factor
        logarithm = tl.where(above == 1, grown, tl.log(above) * (grown / tl.where(above == 1, 1.0, above - 1)))
        slope = tl.where(raw > 20, 1.0, tl.sigmoid(raw))
        raw = tl.where(raw > 20, raw, logarithm)
    return raw, slope


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.tanh(x)
    else:
        return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _is_last(ends, row, there, length):
    if ends is not None:
        return tl.load(ends + row, mask=there, other=1) != 0
    else:
        return row % length == length - 1


@Kernel
@triton.jit(do_not_specialize=["size", "angle_size", "programs", "length"])
def _forward(
    dt, dt_bias, A, trap, angles, ends, log_decay, scale, own, steps, speeds,
    size, angle_size, programs, length, heads,
    SOFTPLUS: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        there = at < size
        step, _ = _steps(dt, dt_bias, at, there, heads, SOFTPLUS)
        present = tl.sigmoid(tl.load(trap + at, mask=there, other=0.0).to(tl.float32)) * step
        follows = there & ~_is_last(ends, at // heads, there, length)
        next_step, _ = _steps(dt, dt_bias, at + heads, follows, heads, SOFTPLUS)
        following = (1 - tl.sigmoid(tl.load(trap + at + heads, mask=follows, other=0.0).to(tl.float32))) * next_step
        tl.store(log_decay + at, step * tl.load(A + at, mask=there, other=0.0), mask=there)
        tl.store(own + at, present, mask=there)
        tl.store(scale + at, present + tl.where(follows, following, 0.0), mask=there)
        tl.store(steps + at, step, mask=there)
    else:
        at = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        there = at < angle_size
        tl.store(speeds + at, PI * _tanh(tl.load(angles + at, mask=there, other=0.0).to(tl.float32), FAST), mask=there)


@Kernel
@triton.jit(do_not_specialize=["size", "angle_size", "programs", "length"])
def _backward(
    dt, dt_bias, A, trap, angles, ends, grad_log_decay, grad_scale, grad_own, grad_steps, grad_speeds, grad_dt, grad_A,
    grad_trap, grad_angles,
    size, angle_size, programs, length, heads,
    SOFTPLUS: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        there = at < size
        row = at // heads
        step, slope = _steps(dt, dt_bias, at, there, heads, SOFTPLUS)
        weight = tl.sigmoid(tl.load(trap + at, mask=there, other=0.0).to(tl.float32))
        earlier = there & (row > 0)
        earlier = earlier & ~_is_last(ends, row - 1, earlier, length)
        of_decay = tl.zeros((BLOCK,), tl.float32)
        of_own = tl.zeros((BLOCK,), tl.float32)
        of_following = tl.zeros((BLOCK,), tl.float32)
        of_step = tl.zeros((BLOCK,), tl.float32)
        if grad_log_decay is not None:
            of_decay = tl.load(grad_log_decay + at, mask=there, other=0.0)
        if grad_own is not None:
            of_own = tl.load(grad_own + at, mask=there, other=0.0)
        if grad_scale is not None:
            of_own += tl.load(grad_scale + at, mask=there, other=0.0)
            of_following = tl.load(grad_scale + at - heads, mask=earlier, other=0.0)
        if grad_steps is not None:
            of_step = tl.load(grad_steps + at, mask=there, other=0.0)
        of_step += of_decay * tl.load(A + at, mask=there, other=0.0)
        of_step += weight * of_own + (1 - weight) * of_following
        tl.store(grad_dt + at, of_step * slope, mask=there)
        tl.store(grad_A + at, of_decay * step, mask=there)
        tl.store(grad_trap + at, weight * (1 - weight) * step * (of_own - of_following), mask=there)
    else:
        at = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        there = at < angle_size
        of_speed = tl.zeros((BLOCK,), tl.float32)
        if grad_speeds is not None:
            of_speed = tl.load(grad_speeds + at, mask=there, other=0.0)
        tanh = _tanh(tl.load(angles + at, mask=there, other=0.0).to(tl.float32), FAST)
        tl.store(grad_angles + at, PI * (1 - tanh * tanh) * of_speed, mask=there)
