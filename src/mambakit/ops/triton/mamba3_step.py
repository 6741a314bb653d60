"""One step of Mamba-3 in one kernel: from the state before it and the step's inputs to y and the state after it.

A program takes BLOCK channels of one head of one sequence, all of its state; nothing is shared between programs, each
turns the key and the query for itself. It is bound by the state's way through memory, and by its launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.mamba3_inputs import Mamba3Inputs, Mamba3State
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel, on_device_of

PI = tl.constexpr(3.141592653589793)
TURN = tl.constexpr(6.283185307179586)

_BLOCK = 16


def step(inputs: Mamba3Inputs) -> tuple[Tensor, Mamba3State]:
    """y (batch, 1, rank, heads, headdim), without the rank axis under mimo_o, and the next state.

    Args:
        inputs: those of a scan of length 1, its initial state among them, which `takes` accepts.
    """
    assert inputs.initial_state is not None
    state = Mamba3State(*(t.contiguous() for t in inputs.initial_state))
    x, B = inputs.x, inputs.B
    (batch, _, heads, headdim), (rank, groups, size), pairs = x.shape, B.shape[2:], inputs.angles.shape[3]
    ranks = (rank,) if inputs.mimo_o is None else ()
    y = x.new_empty(batch, 1, *ranks, heads, headdim)
    after = Mamba3State(
        torch.empty_like(state.angle), torch.empty_like(state.ssm), torch.empty_like(state.k), x[:, 0].contiguous()
    )
    given = (x, inputs.dt, inputs.A, B, inputs.C, inputs.trap, inputs.angles, inputs.z)
    rows = [None if t is None else _contiguous_rows(t) for t in given]
    weights = (inputs.D, inputs.dt_bias, inputs.B_bias, inputs.C_bias, inputs.mimo_x, inputs.mimo_z, inputs.mimo_o)
    block = min(_BLOCK, power_of_two(headdim))
    if batch * heads * headdim:
        with on_device_of(x):
            _step[batch * heads, ceil_div(headdim, block)](
                *rows, *(None if t is None else t.contiguous() for t in weights), *state, y, *after[:3],
                *(0 if t is None else t.stride(0) for t in rows),
                heads, headdim, groups, rank, size, pairs, inputs.angles.shape[2],
                SOFTPLUS=inputs.dt_softplus, INTERLEAVED=inputs.interleaved, STATE=power_of_two(size), BLOCK=block,
                num_warps=2,
            )  # fmt: skip
    return y, after


def takes(inputs: Mamba3Inputs) -> bool:
    """Whether the kernel serves these inputs as they are: no gradients, no graphs, the usual dtypes."""
    state = inputs.initial_state
    assert state is not None
    tensors = [value for value in (*inputs, *state) if isinstance(value, Tensor)]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    narrow = {t.dtype for t in (inputs.x, inputs.B, inputs.C, inputs.z, state.v) if t is not None}
    wide = {state.angle.dtype, state.ssm.dtype, state.k.dtype}
    return len(narrow) == 1 and wide == {torch.float32} and all(t.dtype != torch.float64 for t in tensors)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """(batch, 1, ...) with the numbers of each row side by side."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


@triton.jit
def _turned(
    pointer, bias, at, at_bias, columns, inside, cos, sin, state,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A vector and its bias turned: every coordinate from itself and from its partner."""
    partner = columns ^ 1 if INTERLEAVED else tl.where(columns < state // 2, columns + state // 2, columns - state // 2)
    there = inside & (partner < state) & (partner >= 0)
    own = tl.load(pointer + at + columns, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(pointer + at + partner, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        own += tl.load(bias + at_bias + columns, mask=inside, other=0.0).to(tl.float32)
        other += tl.load(bias + at_bias + partner, mask=there, other=0.0).to(tl.float32)
    return own * cos + other * sin


@Kernel
@triton.jit
def _step(
    x, dt, A, B, C, trap, angles, z, D, dt_bias, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
    angle,  # (batch, heads, pairs)
    ssm,  # (batch, heads, headdim, state)
    k,  # (batch, rank, heads, state)
    v,  # (batch, heads, headdim)
    y, next_angle, next_ssm, next_k,
    x_stride, dt_stride, A_stride, B_stride, C_stride, trap_stride, angles_stride, z_stride,
    heads, headdim, groups, rank, state, pairs, angle_heads,
    SOFTPLUS: tl.constexpr, INTERLEAVED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0) % heads
    first_block = tl.program_id(1) == 0
    group = head // (heads // groups)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channels < headdim
    columns = tl.arange(0, STATE)
    inside = columns < state

    length = tl.load(dt + batch * dt_stride + head).to(tl.float32)
    if dt_bias is not None:
        length += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        grown = tl.exp(tl.minimum(length, 20.0))
        above = 1 + grown  # log1p: what rounding took off 1 + grown is put back as a factor
        length = tl.where(length > 20, length, tl.where(above == 1, grown, tl.log(above) * (grown / (above - 1))))
    weight = tl.sigmoid(tl.load(trap + batch * trap_stride + head).to(tl.float32))
    decay = tl.exp(length * tl.load(A + batch * A_stride + head).to(tl.float32))
    present, before = weight * length, (1 - weight) * length * decay

    if INTERLEAVED:
        pair, first = columns // 2, columns % 2 == 0
    else:
        first = columns < state // 2
        pair = tl.where(first, columns, columns - state // 2)
    turning = inside & (pair < pairs)
    speed = tl.load(angles + batch * angles_stride + (head % angle_heads) * pairs + pair, mask=turning, other=0.0).to(
        tl.float32
    )
    small = tl.exp(-2 * tl.abs(speed))
    size = (1 - small) / (1 + small)
    # Near 0 the difference from 1 has lost its digits, and the first terms of the series have them.
    size = tl.where(tl.abs(speed) < 0.03, tl.abs(speed) * (1 - speed * speed / 3), size)
    turn = PI * tl.where(speed < 0, -size, size) * length
    at_angle = (batch * heads + head) * pairs + pair
    theta = tl.load(angle + at_angle, mask=turning, other=0.0) + turn
    theta = theta - tl.floor(theta / TURN) * TURN
    tl.store(next_angle + at_angle, theta, mask=turning & first & first_block)
    cos, sin = tl.cos(theta), tl.sin(theta)
    sin = tl.where(first, -sin, sin)

    at_ssm = ((batch * heads + head) * headdim + channels)[:, None] * state + columns[None, :]
    mask = there[:, None] & inside[None, :]
    at_channel = (batch * heads + head) * headdim + channels
    carried = tl.load(v + at_channel, mask=there, other=0.0).to(tl.float32)
    given = tl.load(x + batch * x_stride + head * headdim + channels, mask=there, other=0.0).to(tl.float32)
    h = tl.load(ssm + at_ssm, mask=mask, other=0.0) * decay
    for r in range(rank):
        at_key = ((batch * rank + r) * heads + head) * state + columns
        at_bias = (head * rank + r) * state
        at_vector = (r * groups + group) * state
        last_key = tl.load(k + at_key, mask=inside, other=0.0)
        key = _turned(B, B_bias, batch * B_stride + at_vector, at_bias, columns, inside, cos, sin, state, INTERLEAVED)
        up = tl.full((BLOCK,), 1.0, tl.float32)
        if mimo_x is not None:
            up = tl.load(mimo_x + (head * rank + r) * headdim + channels, mask=there, other=0.0).to(tl.float32)
        h += (before * carried * up)[:, None] * last_key[None, :] + (present * given * up)[:, None] * key[None, :]
        tl.store(next_k + at_key, key, mask=inside & first_block)
    tl.store(next_ssm + at_ssm, h, mask=mask)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(rank):
        query = _turned(
            C,
            C_bias,
            batch * C_stride + (r * groups + group) * state,
            (head * rank + r) * state,
            columns,
            inside,
            cos,
            sin,
            state,
            INTERLEAVED,
        )
        out = tl.sum(h * query[None, :], 1)
        at_weight = (head * rank + r) * headdim + channels
        if D is not None:
            value = given
            if mimo_x is not None:
                value = given * tl.load(mimo_x + at_weight, mask=there, other=0.0).to(tl.float32)
            out += tl.load(D + head).to(tl.float32) * value
        if z is not None:
            gate = tl.load(z + batch * z_stride + head * headdim + channels, mask=there, other=0.0).to(tl.float32)
            if mimo_z is not None:
                gate *= tl.load(mimo_z + at_weight, mask=there, other=0.0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        if mimo_o is not None:
            total += out * tl.load(mimo_o + at_weight, mask=there, other=0.0).to(tl.float32)
        else:
            at_y = ((batch * rank + r) * heads + head) * headdim + channels
            tl.store(y + at_y, out.to(y.dtype.element_ty), mask=there)
    if mimo_o is not None:
        tl.store(y + at_channel, total.to(y.dtype.element_ty), mask=there)
