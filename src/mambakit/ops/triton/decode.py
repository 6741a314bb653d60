"""One token through what lies between the projections of a mixer, in as few launches as there are sums over channels.

The convolution is a kernel of its own where it does not end the in-projection (`decode_linear`). The scan of Mamba-1
takes dt_proj with it:

    dt = softplus(dt_proj low + dt_bias),  h' = exp(-exp(A_log) dt) h + dt B u,  y = (C h' + D u) silu(z)

States may be written over those that are read. Kernels that run in a graph may start before the one in front has ended,
as `decode_linear` says.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton.counting import power_of_two
from mambakit.ops.triton.decode_linear import convolved, silu, wait_for_the_kernel_in_front
from mambakit.ops.triton.launch import on_device_of


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, y: Tensor, after: Tensor, early: bool
) -> None:
    """Fill y and the inputs kept for the next step; see `mambakit.ops.decode.convolution`."""
    batch, channels = x.shape
    block = 256
    with on_device_of(x):
        _convolution[(triton.cdiv(channels, block), batch)](
            x,
            weight,
            bias,
            state,
            y,
            after,
            x.stride(0),
            channels,
            TAPS=weight.shape[1],
            BLOCK=block,
            EARLY=early,
            num_warps=2,
            launch_pdl=early,
        )


def mamba_scan(
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor,
    y: Tensor,
    after: Tensor,
    early: bool,
) -> None:
    """Fill y and the state after the step; see `mambakit.ops.decode.mamba_scan`."""
    rows, dim = u.shape
    rank, size = dt_weight.shape[1], A_log.shape[1]
    block = 16 if rows * dim < 1 << 14 else 64 if rows * dim < 1 << 16 else 128
    with on_device_of(u):
        _mamba_scan[(triton.cdiv(dim, block), rows)](
            u,
            projected,
            dt_weight,
            dt_bias,
            A_log,
            D,
            z,
            state,
            y,
            after,
            u.stride(0),
            projected.stride(0),
            z.stride(0),
            dim,
            RANK=rank,
            STATE=size,
            RANK_BLOCK=power_of_two(rank),
            STATE_BLOCK=power_of_two(size),
            BLOCK=block,
            EARLY=early,
            num_warps=4 if block * power_of_two(size) >= 256 else 1,
            launch_pdl=early,
        )


def mamba2_scan(
    xBC: Tensor,
    dt: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    state: Tensor,
    y: Tensor,
    after: Tensor,
    early: bool,
) -> None:
    """Fill y and the state after the step; see `mambakit.ops.decode.mamba2_scan`."""
    batch, heads, headdim, size = state.shape
    groups = (xBC.shape[1] - heads * headdim) // (2 * size)
    rows = min(16 if batch < 16 else 8, power_of_two(headdim))
    with on_device_of(xBC):
        _mamba2_scan[(batch, heads, triton.cdiv(headdim, rows))](
            xBC,
            dt,
            A_log,
            D,
            z,
            dt_bias,
            state,
            y,
            after,
            xBC.stride(0),
            dt.stride(0),
            0 if z is None else z.stride(0),
            heads,
            groups,
            D.stride(0),
            D.stride(1),
            *dt_limit,
            HEADDIM=headdim,
            STATE=size,
            STATE_BLOCK=power_of_two(size),
            BLOCK=rows,
            EARLY=early,
            num_warps=4 if batch < 16 else 1,
            launch_pdl=early,
        )


@triton.jit
def _softplus(value):
    e = tl.exp(tl.minimum(value, 20.0))
    small = e * (1.0 - e * (0.5 - e / 3.0))  # where 1 + e would lose what e says
    return tl.where(value > 20.0, value, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit
def _convolution(
    x,
    weight,
    bias,
    state,
    y,
    after,
    x_row,
    channels,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    state += row * (TAPS - 1) * channels
    after += row * (TAPS - 1) * channels
    wait_for_the_kernel_in_front(EARLY)
    now = tl.load(x + row * x_row + channel, mask=inside, other=0.0)
    value = convolved(now, weight, bias, state, after, channel, inside, channels, TAPS)
    tl.store(y + row * channels + channel, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _mamba_scan(
    u,
    projected,
    dt_weight,
    dt_bias,
    A_log,
    D,
    z,
    state,
    y,
    after,
    u_row,
    projected_row,
    z_row,
    dim,
    RANK: tl.constexpr,
    STATE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < dim
    r, n = tl.arange(0, RANK_BLOCK), tl.arange(0, STATE_BLOCK)
    there = inside[:, None] & (n < STATE)[None, :]
    at = channel[:, None] * STATE + n[None, :]
    taps = tl.load(
        dt_weight + channel[:, None] * RANK + r[None, :], mask=inside[:, None] & (r < RANK)[None, :], other=0.0
    )
    rate = tl.exp(tl.load(A_log + at, mask=there, other=0.0))
    step_bias = tl.load(dt_bias + channel, mask=inside, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    h = tl.load(state + row * dim * STATE + at, mask=there, other=0.0)  # which in a graph this kernel alone writes
    wait_for_the_kernel_in_front(EARLY)
    projected += row * projected_row
    low = tl.load(projected + r, mask=r < RANK, other=0.0).to(tl.float32)
    B = tl.load(projected + RANK + n, mask=n < STATE, other=0.0).to(tl.float32)
    C = tl.load(projected + RANK + STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
    value = tl.load(u + row * u_row + channel, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    dt = _softplus(tl.sum(taps.to(tl.float32) * low[None, :], axis=1) + step_bias)
    h = tl.exp(-rate * dt[:, None]) * h + (dt * value)[:, None] * B[None, :]
    out = (tl.sum(h * C[None, :], axis=1) + skip * value) * silu(gate)
    tl.store(y + row * dim + channel, out.to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # `after` may be `state`
    tl.store(after + row * dim * STATE + at, h, mask=there)


@triton.jit(do_not_specialize=["heads", "groups", "dt_min", "dt_max"])
def _mamba2_scan(
    xBC,
    dt,
    A_log,
    D,
    z,
    dt_bias,
    state,
    y,
    after,
    xBC_row,
    dt_row,
    z_row,
    heads,
    groups,
    D_head,
    D_row,
    dt_min,
    dt_max,
    HEADDIM: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE_BLOCK)
    own, shared = p < HEADDIM, n < STATE
    share = heads // groups  # heads of a group
    group = head // share
    dim = heads * HEADDIM
    xBC += row * xBC_row
    at = head * HEADDIM + p
    there = own[:, None] & shared[None, :]
    place = ((row * heads + head) * HEADDIM + p[:, None]) * STATE + n[None, :]
    rate = -tl.exp(tl.load(A_log + head))
    step_bias = tl.load(dt_bias + head)
    skip = tl.load(D + head * D_head + p * D_row, mask=own, other=0.0)
    h = tl.load(state + place, mask=there, other=0.0)  # which in a graph this kernel alone writes
    wait_for_the_kernel_in_front(EARLY)
    u = tl.load(xBC + at, mask=own, other=0.0).to(tl.float32)
    B = tl.load(xBC + dim + group * STATE + n, mask=shared, other=0.0).to(tl.float32)
    C = tl.load(xBC + dim + (groups + group) * STATE + n, mask=shared, other=0.0).to(tl.float32)
    step = _softplus(tl.load(dt + row * dt_row + head).to(tl.float32) + step_bias)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    h = tl.exp(rate * step) * h + (step * u)[:, None] * B[None, :]
    out = tl.sum(h * C[None, :], axis=1) + skip * u
    if z is not None:
        out *= silu(tl.load(z + row * z_row + at, mask=own, other=0.0).to(tl.float32))
    tl.store(y + row * dim + at, out.to(y.dtype.element_ty), mask=own)
    tl.debug_barrier()  # `after` may be `state`
    tl.store(after + place, h, mask=there)
