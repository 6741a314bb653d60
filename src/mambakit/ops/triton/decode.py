"""One token through what lies between the projections of a mixer, in as few launches as there are sums over channels.

Mamba-1: the convolution with x_proj, which needs all channels; then, channel by channel, the rest:

    dt = softplus(dt_proj low + dt_bias),  h' = exp(-exp(A_log) dt) h + dt B u,  y = (C h' + D u) silu(z)

The second kernel convolves anew, which costs less than to read what the first one could have written. Mamba-2: one
kernel convolves x, B and C and steps the state.

States may be written over those that are read, but for the convolution's of Mamba-2, which several programs read.
Kernels that run in a graph may start before the one in front has ended, as `decode_linear` says.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton.decode_linear import silu, wait_for_the_kernel_in_front
from mambakit.ops.triton.launch import on_device_of, power_of_two


def mamba_select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    x_proj: Tensor,
    projected: Tensor,
    early: bool,
) -> None:
    """Fill what x_proj makes of the convolved x; see `mambakit.ops.decode.mamba_scan`."""
    rows, channels = x.shape
    outs = x_proj.shape[0]
    padded = power_of_two(channels)
    block = max(1, min(2048 // padded if rows < 8 else 16384 // padded, power_of_two(outs)))
    with on_device_of(x):
        _mamba_select[(triton.cdiv(outs, block), rows)](
            x,
            weight,
            bias,
            conv,
            x_proj,
            projected,
            x.stride(0),
            outs,
            CHANNELS=channels,
            PADDED=padded,
            TAPS=weight.shape[1],
            BLOCK=block,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )


def mamba_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    conv: Tensor,
    state: Tensor,
    y: Tensor,
    conv_after: Tensor,
    after: Tensor,
    early: bool,
) -> None:
    """Fill y and both states after the step; see `mambakit.ops.decode.mamba_scan`."""
    rows, dim = x.shape
    rank, size = dt_weight.shape[1], A_log.shape[1]
    block = 16 if rows * dim < 1 << 14 else 64
    with on_device_of(x):
        _mamba_scan[(triton.cdiv(dim, block), rows)](
            x,
            weight,
            bias,
            projected,
            dt_weight,
            dt_bias,
            A_log,
            D,
            z,
            conv,
            state,
            y,
            conv_after,
            after,
            x.stride(0),
            z.stride(0),
            dim,
            TAPS=weight.shape[1],
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
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    conv: Tensor,
    state: Tensor,
    y: Tensor,
    conv_after: Tensor,
    after: Tensor,
    early: bool,
) -> None:
    """Fill y and both states after the step; see `mambakit.ops.decode.mamba2_scan`."""
    batch, heads, headdim, size = state.shape
    groups = (xBC.shape[1] - heads * headdim) // (2 * size)
    rows = min(16, power_of_two(headdim))
    with on_device_of(xBC):
        _mamba2_scan[(batch, heads, triton.cdiv(headdim, rows))](
            xBC,
            dt,
            weight,
            bias,
            A_log,
            D,
            z,
            dt_bias,
            conv,
            state,
            y,
            conv_after,
            after,
            xBC.stride(0),
            dt.stride(0),
            0 if z is None else z.stride(0),
            heads,
            groups,
            D.stride(0),
            D.stride(1),
            *dt_limit,
            TAPS=weight.shape[1],
            HEADDIM=headdim,
            STATE=size,
            STATE_BLOCK=power_of_two(size),
            BLOCK=rows,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )


@triton.jit
def _softplus(value):
    e = tl.exp(tl.minimum(value, 20.0))
    small = e * (1.0 - e * (0.5 - e / 3.0))  # where 1 + e would lose what e says
    return tl.where(value > 20.0, value, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit
def _convolved(x, weight, bias, conv, channel, inside, channels, TAPS: tl.constexpr):
    """silu of the convolution at some channels of one row, in float32."""
    now = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(weight + channel * TAPS + (TAPS - 1), mask=inside, other=0.0).to(tl.float32) * now
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS - 1):
        before = tl.load(conv + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(weight + channel * TAPS + k, mask=inside, other=0.0).to(tl.float32) * before
    return silu(value)


@triton.jit
def _shift(x, conv, conv_after, channel, inside, channels, TAPS: tl.constexpr):
    """Write the inputs of the next step's convolution: those of this one but the oldest, and x."""
    for k in tl.static_range(TAPS - 1):
        if k + 1 < TAPS - 1:
            kept = tl.load(conv + (k + 1) * channels + channel, mask=inside, other=0.0)
        else:
            kept = tl.load(x + channel, mask=inside, other=0.0)
        tl.debug_barrier()  # conv_after may be conv: nobody overwrites what another thread is still to read
        tl.store(conv_after + k * channels + channel, kept, mask=inside)


@triton.jit
def _mamba_select(
    x,
    weight,
    bias,
    conv,
    x_proj,
    projected,
    x_row,
    outs,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    n, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    own, inside = n < outs, channel < CHANNELS
    taps = tl.load(x_proj + n[:, None] * CHANNELS + channel[None, :], mask=own[:, None] & inside[None, :], other=0.0)
    wait_for_the_kernel_in_front(EARLY)
    u = _convolved(x + row * x_row, weight, bias, conv + row * (TAPS - 1) * CHANNELS, channel, inside, CHANNELS, TAPS)
    u = u.to(x.dtype.element_ty).to(tl.float32)
    out = tl.sum(taps.to(tl.float32) * u[None, :], axis=1)
    tl.store(projected + row * outs + n, out.to(projected.dtype.element_ty), mask=own)


@triton.jit
def _mamba_scan(
    x,
    weight,
    bias,
    projected,
    dt_weight,
    dt_bias,
    A_log,
    D,
    z,
    conv,
    state,
    y,
    conv_after,
    after,
    x_row,
    z_row,
    dim,
    TAPS: tl.constexpr,
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
    x += row * x_row
    conv += row * (TAPS - 1) * dim
    conv_after += row * (TAPS - 1) * dim
    projected += row * (RANK + 2 * STATE)
    low = tl.load(projected + r, mask=r < RANK, other=0.0).to(tl.float32)
    B = tl.load(projected + RANK + n, mask=n < STATE, other=0.0).to(tl.float32)
    C = tl.load(projected + RANK + STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
    u = _convolved(x, weight, bias, conv, channel, inside, dim, TAPS)
    u = u.to(x.dtype.element_ty).to(tl.float32)
    dt = _softplus(tl.sum(taps.to(tl.float32) * low[None, :], axis=1) + step_bias)
    h = tl.exp(-rate * dt[:, None]) * h + (dt * u)[:, None] * B[None, :]
    out = (tl.sum(h * C[None, :], axis=1) + skip * u) * silu(
        tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    )
    tl.store(y + row * dim + channel, out.to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # `after` may be `state`
    tl.store(after + row * dim * STATE + at, h, mask=there)
    _shift(x, conv, conv_after, channel, inside, dim, TAPS)


@triton.jit(do_not_specialize=["heads", "groups", "dt_min", "dt_max"])
def _mamba2_scan(
    xBC,
    dt,
    weight,
    bias,
    A_log,
    D,
    z,
    dt_bias,
    conv,
    state,
    y,
    conv_after,
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
    TAPS: tl.constexpr,
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
    channels = dim + 2 * groups * STATE
    xBC += row * xBC_row
    conv += row * (TAPS - 1) * channels
    conv_after += row * (TAPS - 1) * channels
    leads = (head % share == 0) & (tl.program_id(2) == 0)
    at = head * HEADDIM + p
    B_at = dim + group * STATE + n
    C_at = dim + (groups + group) * STATE + n
    there = own[:, None] & shared[None, :]
    place = ((row * heads + head) * HEADDIM + p[:, None]) * STATE + n[None, :]
    rate = -tl.exp(tl.load(A_log + head))
    step_bias = tl.load(dt_bias + head)
    skip = tl.load(D + head * D_head + p * D_row, mask=own, other=0.0)
    h = tl.load(state + place, mask=there, other=0.0)  # which in a graph this kernel alone writes
    wait_for_the_kernel_in_front(EARLY)
    u = _convolved(xBC, weight, bias, conv, at, own, channels, TAPS)
    B = _convolved(xBC, weight, bias, conv, B_at, shared, channels, TAPS)
    C = _convolved(xBC, weight, bias, conv, C_at, shared, channels, TAPS)
    step = _softplus(tl.load(dt + row * dt_row + head).to(tl.float32) + step_bias)
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    h = tl.exp(rate * step) * h + (step * u)[:, None] * B[None, :]
    out = tl.sum(h * C[None, :], axis=1) + skip * u
    if z is not None:
        out *= silu(tl.load(z + row * z_row + at, mask=own, other=0.0).to(tl.float32))
    tl.store(y + row * dim + at, out.to(y.dtype.element_ty), mask=own)
    tl.debug_barrier()  # `after` may be `state`
    tl.store(after + place, h, mask=there)
    _shift(xBC, conv, conv_after, at, own, channels, TAPS)
    if leads:
        _shift(xBC, conv, conv_after, B_at, shared, channels, TAPS)
        _shift(xBC, conv, conv_after, C_at, shared, channels, TAPS)
