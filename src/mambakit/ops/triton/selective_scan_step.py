"""One step of the selective scan in one launch, for decoding."""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.inputs import ScanInputs
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.selective_scan_steps import LOG2_E, sigmoid, step_size

_ELEMENTS = 1024  # of a state that a program updates: eight of each lane


def step(inputs: ScanInputs, y: Tensor, final_state: Tensor) -> None:
    """`mambakit.ops.triton.selective_scan.forward` where the length is one; the inputs may go without its axis."""
    u, delta, A, B, C, D, z, bias, initial, _, softplus = inputs
    D, bias = (None if t is None else t.contiguous() for t in (D, bias))
    batch, dim = u.shape[0], u.shape[-1]
    groups, state = groups_and_state(u, B)
    padded = power_of_two(max(state, 1))
    block = min(max(_ELEMENTS // padded, 1), power_of_two(dim))
    _step[batch, ceil_div(dim, block)](
        u, delta, A, B, C, D, z, bias, initial, y, final_state, dim, dim // groups,
        u.stride(0), u.stride(-1), delta.stride(0), delta.stride(-1), *A.stride(),
        B.stride(0), B.stride(-2), B.stride(-1), C.stride(0), C.stride(-2), C.stride(-1),
        *((z.stride(0), z.stride(-1)) if z is not None else (0, 0)),
        *(initial.stride() if initial is not None else (0, 0, 0)),
        N=state, PADDED=padded, BLOCK=block, SOFTPLUS=softplus, INITIAL=initial is not None,
        BIAS=bias is not None, SKIP=D is not None, GATE=z is not None, num_warps=4,
    )  # fmt: skip


def groups_and_state(u: Tensor, B: Tensor) -> tuple[int, int]:
    """The groups and the state of B (batch, [length,] [groups,] state), whose length has an axis if that of u has."""
    return 1 if B.dim() == u.dim() else B.shape[-2], B.shape[-1]


@Kernel
@triton.jit(do_not_specialize=["u_batch", "delta_batch", "B_batch", "C_batch", "z_batch", "h_batch"])
def _step(
    u, delta, A, B, C, D, z, delta_bias, initial, y, final, dim, share,
    u_batch, u_dim, delta_batch, delta_dim, A_dim, A_state, B_batch, B_group, B_state, C_batch, C_group, C_state,
    z_batch, z_dim, h_batch, h_dim, h_state,
    N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr, INITIAL: tl.constexpr,
    BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, PADDED)[None, :]
    present = channel < dim
    both = present[:, None] & (n < N)
    at = channel[:, None]
    group = (channel // share)[:, None]
    x = tl.load(u + batch * u_batch + channel * u_dim, mask=present, other=0.0).to(tl.float32)
    bias = tl.load(delta_bias + channel, mask=present, other=0.0) if BIAS else 0.0
    dt = step_size(tl.load(delta + batch * delta_batch + channel * delta_dim, mask=present, other=0.0), bias, SOFTPLUS)
    rate = tl.load(A + at * A_dim + n * A_state, mask=both, other=0.0) * LOG2_E
    b = tl.load(B + batch * B_batch + group * B_group + n * B_state, mask=both, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + group * C_group + n * C_state, mask=both, other=0.0).to(tl.float32)
    h = (dt * x)[:, None] * b
    if INITIAL:
        h += tl.exp2(dt[:, None] * rate) * tl.load(
            initial + batch * h_batch + at * h_dim + n * h_state, mask=both, other=0.0
        )
    tl.store(final + (batch * dim + at) * N + n, h, mask=both)
    out = tl.sum(h * c, axis=1)
    if SKIP:
        out += tl.load(D + channel, mask=present, other=0.0) * x
    if GATE:
        gate = tl.load(z + batch * z_batch + channel * z_dim, mask=present, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * dim + channel, out.to(y.dtype.element_ty), mask=present)
