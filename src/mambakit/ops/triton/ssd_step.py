"""One step of the scan of Mamba-2 on the GPU, in one launch: the state is read once and the next one written once.

    h' = exp(dt A) h + dt x B^T        y = (h' C + D x) silu(z)

The tensors are taken in the dtypes they have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops import dispatch
from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel, on_device_of
from mambakit.ops.triton.ssd_forward import silu
from mambakit.ops.triton.ssd_steps import softplus

_ROWS = 16  # of the headdim to a program: enough programs at batch 1, and 16 bytes a load


def step(inputs: SsdInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """y (batch, heads, headdim) and the state after `state`, of inputs with a length of one."""
    x, dt, A, B, C, D, z, dt_bias, *_ = inputs
    batch, _, heads, headdim = x.shape
    groups, width = B.shape[2:]
    B, C, state = (t if t.stride(-1) == 1 else t.contiguous() for t in (B, C, state))
    y = torch.empty(batch, heads, headdim, dtype=dispatch.common_dtype(x, dt, B, C, z), device=x.device)
    following = torch.empty(state.shape, dtype=torch.float32, device=x.device)
    if following.numel() == 0:
        return y.zero_(), following
    rows = min(_ROWS, power_of_two(headdim))
    with on_device_of(x):
        _step[ceil_div(headdim, rows), heads, batch](
            state, x, dt, A, B, C, A if D is None else D, x if z is None else z, A if dt_bias is None else dt_bias,
            y, following, *state.stride()[:3], *_strides(x), *_strides(dt), *_strides(B)[:2], *_strides(C)[:2],
            *((0, 0) if D is None else D.stride()), *((0, 0, 0) if z is None else _strides(z)),
            A.stride(0), 0 if dt_bias is None else dt_bias.stride(0), heads, headdim, width, heads // groups,
            ROWS=rows, WIDTH=power_of_two(width), SOFTPLUS=inputs.dt_softplus, HAS_D=D is not None,
            HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, DT_MIN=inputs.dt_min, DT_MAX=inputs.dt_max, num_warps=4,
        )  # fmt: skip
    return y, following


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Without that of the length."""
    first, _, *rest = tensor.stride()
    return (first, *rest)


@Kernel
@triton.jit(do_not_specialize=["state_batch", "x_batch", "dt_batch", "B_batch", "C_batch", "z_batch"])
def _step(
    state, x, dt, A, B, C, D, z, dt_bias, y, following,
    state_batch, state_head, state_row, x_batch, x_head, x_row, dt_batch, dt_head, B_batch, B_group, C_batch, C_group,
    D_head, D_row, z_batch, z_head, z_row, A_head, bias_head, heads, headdim, width, share,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of the state of a head."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // share
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    in_p, in_n = p < headdim, n < width
    inside = in_p[:, None] & in_n[None, :]
    h_at = state + batch * state_batch + head * state_head + p[:, None] * state_row + n[None, :]
    h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
    Bs = tl.load(B + batch * B_batch + group * B_group + n, mask=in_n, other=0.0).to(tl.float32)
    Cs = tl.load(C + batch * C_batch + group * C_group + n, mask=in_n, other=0.0).to(tl.float32)
    xs = tl.load(x + batch * x_batch + head * x_head + p * x_row, mask=in_p, other=0.0).to(tl.float32)
    raw = tl.load(dt + batch * dt_batch + head * dt_head).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + head * bias_head).to(tl.float32)
    wide = softplus(raw) if SOFTPLUS else raw
    taken = tl.where(wide == wide, tl.minimum(tl.maximum(wide, DT_MIN), DT_MAX), wide)
    h = h * tl.exp(taken * tl.load(A + head * A_head).to(tl.float32)) + (taken * xs)[:, None] * Bs[None, :]
    out = tl.sum(h * Cs[None, :], 1)
    if HAS_D:
        out += tl.load(D + head * D_head + p * D_row, mask=in_p, other=0.0).to(tl.float32) * xs
    if HAS_Z:
        zs = tl.load(z + batch * z_batch + head * z_head + p * z_row, mask=in_p, other=0.0).to(tl.float32)
        out *= silu(zs)
    tl.store(y + (batch * heads + head) * headdim + p, out, mask=in_p)
    tl.store(following + ((batch * heads + head) * headdim + p[:, None]) * width + n[None, :], h, mask=inside)
