"""One token through what lies between the projections of a mixer, in as few launches as there are sums over channels.

Mamba-1: the convolution, which reads its weights in the dtype that they have, and after x_proj one kernel for the rest:

    dt = softplus(dt_proj low + dt_bias),  h' = exp(-exp(A_log) dt) h + dt B u,  y = (C h' + D u) silu(z)

Mamba-2: one kernel convolves x, B and C and steps the state. The state of a scan
may be written over the one that is read; that of a convolution is read by several programs and may not.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton.launch import on_device_of, power_of_two


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, y: Tensor, after: Tensor) -> None:
    """Fill y and the inputs kept for the next step; see `mambakit.ops.decode.convolution`."""
    batch, channels = x.shape
    block = 256
    with on_device_of(x):
        _convolution[(batch, triton.cdiv(channels, block))](
            x, weight, bias, state, y, after, x.stride(0), channels, WIDTH=weight.shape[1], BLOCK=block, num_warps=2
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
) -> None:
    """Fill y and the state after the step; see `mambakit.ops.decode.mamba_scan`."""
    batch, dim = u.shape
    rank, size = dt_weight.shape[1], A_log.shape[1]
    block = 32 if batch * dim < 1 << 15 else 128
    with on_device_of(u):
        _mamba_scan[(batch, triton.cdiv(dim, block))](
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
            num_warps=4,
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
            WIDTH=weight.shape[1],
            HEADDIM=headdim,
            STATE=size,
            STATE_BLOCK=power_of_two(size),
            BLOCK=rows,
            num_warps=4,
        )


@triton.jit
def _softplus(value):
    e = tl.exp(tl.minimum(value, 20.0))
    small = e * (1.0 - e * (0.5 - e / 3.0))  # where 1 + e would lose what e says
    return tl.where(value > 20.0, value, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit(do_not_specialize=["u_row", "projected_row", "z_row"])
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
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < dim
    r, n = tl.arange(0, RANK_BLOCK), tl.arange(0, STATE_BLOCK)
    projected += row * projected_row
    low = tl.load(projected + r, mask=r < RANK, other=0.0).to(tl.float32)
    taps = tl.load(
        dt_weight + channel[:, None] * RANK + r[None, :], mask=inside[:, None] & (r < RANK)[None, :], other=0.0
    )
    dt = tl.sum(taps.to(tl.float32) * low[None, :], axis=1)
    dt = _softplus(dt + tl.load(dt_bias + channel, mask=inside, other=0.0))
    B = tl.load(projected + RANK + n, mask=n < STATE, other=0.0).to(tl.float32)
    C = tl.load(projected + RANK + STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
    there = inside[:, None] & (n < STATE)[None, :]
    at = channel[:, None] * STATE + n[None, :]
    rate = tl.exp(tl.load(A_log + at, mask=there, other=0.0))
    value = tl.load(u + row * u_row + channel, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(state + row * dim * STATE + at, mask=there, other=0.0)
    h = tl.exp(-rate * dt[:, None]) * h + (dt * value)[:, None] * B[None, :]
    tl.store(after + row * dim * STATE + at, h, mask=there)
    out = tl.sum(h * C[None, :], axis=1) + tl.load(D + channel, mask=inside, other=0.0) * value
    gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + row * dim + channel, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _convolved(xBC, weight, bias, conv, conv_after, channel, inside, first, channels, WIDTH: tl.constexpr):
    """silu of the convolution at some channels; the inputs kept for the next step are written where `first`."""
    now = tl.load(xBC + channel, mask=inside, other=0.0)
    value = tl.load(weight + channel * WIDTH + (WIDTH - 1), mask=inside, other=0.0).to(tl.float32) * now.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        before = tl.load(conv + k * channels + channel, mask=inside, other=0.0)
        value += tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0).to(tl.float32) * before.to(tl.float32)
        if k > 0:
            tl.store(conv_after + (k - 1) * channels + channel, before, mask=inside & first)
    if WIDTH > 1:
        tl.store(conv_after + (WIDTH - 2) * channels + channel, now, mask=inside & first)
    return value / (1.0 + tl.exp(-value))


@triton.jit(do_not_specialize=["x_row"])
def _convolution(x, weight, bias, state, y, after, x_row, channels, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    state += row * (WIDTH - 1) * channels
    after += row * (WIDTH - 1) * channels
    value = _convolved(x + row * x_row, weight, bias, state, after, channel, inside, True, channels, WIDTH)
    tl.store(y + row * channels + channel, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["xBC_row", "dt_row", "z_row", "heads", "groups", "dt_min", "dt_max"])
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
    WIDTH: tl.constexpr,
    HEADDIM: tl.constexpr,
    STATE: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATE_BLOCK)
    own, shared = p < HEADDIM, n < STATE
    share = heads // groups  # heads of a group
    group = head // share
    dim = heads * HEADDIM
    channels = dim + 2 * groups * STATE
    xBC += row * xBC_row
    conv += row * (WIDTH - 1) * channels
    conv_after += row * (WIDTH - 1) * channels
    leads = (head % share == 0) & (tl.program_id(2) == 0)
    at = head * HEADDIM + p
    u = _convolved(xBC, weight, bias, conv, conv_after, at, own, True, channels, WIDTH)
    B = dim + group * STATE + n
    B = _convolved(xBC, weight, bias, conv, conv_after, B, shared, leads, channels, WIDTH)
    C = dim + (groups + group) * STATE + n
    C = _convolved(xBC, weight, bias, conv, conv_after, C, shared, leads, channels, WIDTH)

    step = _softplus(tl.load(dt + row * dt_row + head).to(tl.float32) + tl.load(dt_bias + head))
    step = tl.minimum(tl.maximum(step, dt_min), dt_max)
    decay = tl.exp(-tl.exp(tl.load(A_log + head)) * step)
    there = own[:, None] & shared[None, :]
    place = ((row * heads + head) * HEADDIM + p[:, None]) * STATE + n[None, :]
    h = tl.load(state + place, mask=there, other=0.0)
    h = decay * h + (step * u)[:, None] * B[None, :]
    tl.store(after + place, h, mask=there)
    out = tl.sum(h * C[None, :], axis=1) + tl.load(D + head * D_head + p * D_row, mask=own, other=0.0) * u
    if z is not None:
        gate = tl.load(z + row * z_row + at, mask=own, other=0.0).to(tl.float32)
        out *= gate / (1.0 + tl.exp(-gate))
    tl.store(y + row * dim + at, out.to(y.dtype.element_ty), mask=own)
