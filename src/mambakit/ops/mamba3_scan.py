"""The scan of Mamba-3 (arXiv 2603.15569): a trapezoid's rule, rotations, and several inputs to one state.

    theta_t = theta_{t-1} + pi tanh(angles_t) dt_t
    k_t     = Rot(theta_t) (B_t + B_bias),   q_t = Rot(theta_t) (C_t + C_bias),   v_t = mimo_x x_t
    h_t     = a_t h_{t-1} + (1 - l_t) dt_t a_t v_{t-1} k_{t-1}^T + l_t dt_t v_t k_t^T,   a_t = exp(dt_t A_t)
    y_t     = sum over ranks of mimo_o (h_t q_t + D v_t) silu(mimo_z z_t)

with dt_t = softplus(dt_t + dt_bias) and l_t = sigmoid(trap_t). `mambakit.ops.reference.mamba3_scan` is the definition.
The compiled backend runs all of it in the torch operator `mambakit::mamba3_scan`. The portable one forms v, k, q and
the weights by tensor operations, and leaves the recurrence to the torch operator `mambakit::mamba3_recurrence`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops import dispatch
from mambakit.ops.mamba3_inputs import Mamba3Inputs, Mamba3State, outer, per_head, per_rank
from mambakit.ops.mamba3_recurrence import KERNELS, last, recurrence
from mambakit.ops.mamba3_whole import KERNELS as WHOLE_KERNELS
from mambakit.ops.mamba3_whole import whole_scan
from mambakit.ops.packing import check_packing, sequence_bounds, sequence_count
from mambakit.ops.reference.mamba3_scan import mamba3_scan as reference
from mambakit.ops.rotation import accumulate, rotate
from mambakit.ops.triton import Kernels, mamba3_shapes

# steps * rank: where products within a chunk cost about what those with its state do, or where they leave the caches
_ROWS_OF_A_CHUNK = {"triton": 64, "cpu": 64, "portable": 128}

_STEP = Kernels("mamba3_step")

_NARROW = ("x", "B", "C", "z")
_WIDE = ("dt", "A", "trap", "angles", "D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")


def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    dt_softplus: bool = False,
    interleaved: bool = True,
    chunk_size: int | None = None,
    initial_state: Mamba3State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Mamba3State]:
    """Run the scan of Mamba-3; differentiable in every tensor, those of the states included.

    Args:
        x, z: (batch, length, heads, headdim).
        dt, A, trap: (batch, length, heads); A, negative for a state that decays, goes with the step; trap is the
            weight of a step's own input against that of the input before it, before its sigmoid.
        B, C: (batch, length, groups, state), or (batch, length, rank, groups, state) for several inputs and outputs
            (MIMO); `groups` divides `heads` and each group serves `heads / groups` neighbouring heads.
        angles: (batch, length, pairs) for all heads or (batch, length, heads, pairs); 2 pairs <= state.
        D, dt_bias: (heads,).
        B_bias, C_bias: (heads, rank, state), added before the rotation.
        mimo_x, mimo_z, mimo_o: (heads, rank, headdim): what makes one x and z into one for each rank, and one y of all.
        dt_softplus: pass dt (its bias added) through softplus.
        interleaved: rotate the coordinates (2i, 2i + 1), as SISO checkpoints do; else (i, i + state / 2), as MIMO
            checkpoints do.
        chunk_size: steps that go into one matrix product, None for a good choice. It changes the time taken and the
            memory, not the result; the reference goes step by step whatever it is.
        initial_state: what an earlier call returned; zero if None.
        return_final_state: also return the state after the last step.
        cu_seqlens: (sequences + 1,) integers from 0 to length: packed sequences. Batch is then 1, and states are
            per sequence.
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        y in the common dtype of x, B, C and z: (batch, length, heads, headdim), or with a rank axis and no mimo_o
        (batch, length, rank, heads, headdim). With `return_final_state`, (y, state), the state in float32 (float64
        where any input is) but for v, which is the last x.

    Raises:
        ValueError: a shape, a chunk size, a backend or cu_seqlens that does not fit; TypeError: a dtype that is not
            floating.

    >>> x, z = torch.randn(2, 2, 100, 8, 4).unbind()
    >>> dt, A, trap = torch.rand(2, 100, 8), -torch.rand(2, 100, 8), torch.randn(2, 100, 8)
    >>> B, C = torch.randn(2, 2, 100, 1, 16).unbind()
    >>> y, state = mamba3_scan(x, dt, A, B, C, trap, torch.randn(2, 100, 4), return_final_state=True)
    >>> y.shape, state.ssm.shape, state.angle.shape
    (torch.Size([2, 100, 8, 4]), torch.Size([2, 8, 4, 16]), torch.Size([2, 8, 4]))
    """
    has_ranks = B.dim() == 5
    B, C = (t.unsqueeze(2) if t.dim() == 4 else t for t in (B, C))
    angles = angles.unsqueeze(2) if angles.dim() == 3 else angles
    biases, mimo = (B_bias, C_bias), (mimo_x, mimo_z, mimo_o)
    inputs = Mamba3Inputs(
        x, dt, A, B, C, trap, angles, D, z, dt_bias, *biases, *mimo, initial_state, cu_seqlens, dt_softplus, interleaved
    )
    _check(inputs, chunk_size)
    rank, _, state = inputs.B.shape[2:]
    wide = _sums_dtype(inputs)

    def refusal(backend: str) -> str | None:
        return mamba3_shapes.refusal(rank, state, wide) if backend == "triton" else None

    name = dispatch.choose(x.device, backend, (*WHOLE_KERNELS, *KERNELS, "reference"), refusal)
    inputs = _with_common_dtypes(inputs, wide, name)
    final_state: Mamba3State | None
    if name == "reference":
        y, final_state = reference(inputs)
    else:
        steps = chunk_size or max(1, _ROWS_OF_A_CHUNK[name] // B.shape[2])
        y, final_state = _scan(inputs, steps, name, return_final_state)
    if mimo_o is None and not has_ranks:
        y = y.squeeze(2)
    if not return_final_state:
        return y
    assert final_state is not None
    return y, final_state


def mamba3_step(
    state: Mamba3State,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    dt_softplus: bool = False,
    interleaved: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Mamba3State]:
    """One step of `mamba3_scan` from `state`: returns (y, the next state).

    Every tensor that has a length in `mamba3_scan`, y among them, has none here; the rest is as there.
    """
    x, dt, A, B, C, trap, angles = (t[:, None] for t in (x, dt, A, B, C, trap, angles))
    if dispatch.choose(x.device, backend, (*WHOLE_KERNELS, *KERNELS, "reference")) == "triton":
        biases, mimo = (B_bias, C_bias), (mimo_x, mimo_z, mimo_o)
        gates = (D, None if z is None else z[:, None], dt_bias)
        inputs = Mamba3Inputs(
            x,
            dt,
            A,
            B.unsqueeze(2) if B.dim() == 4 else B,
            C.unsqueeze(2) if C.dim() == 4 else C,
            trap,
            angles.unsqueeze(2) if angles.dim() == 3 else angles,
            *gates,
            *biases,
            *mimo,
            state,
            None,
            dt_softplus,
            interleaved,
        )
        _check(inputs, None)
        if _STEP.takes(inputs):
            y, final_state = _STEP.step(inputs)
            return (y[:, 0] if mimo_o is not None or B.dim() == 5 else y[:, 0, 0]), final_state
    y, final_state = mamba3_scan(
        x,
        dt,
        A,
        B,
        C,
        trap,
        angles,
        D,
        None if z is None else z[:, None],
        dt_bias,
        B_bias=B_bias,
        C_bias=C_bias,
        mimo_x=mimo_x,
        mimo_z=mimo_z,
        mimo_o=mimo_o,
        dt_softplus=dt_softplus,
        interleaved=interleaved,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return y[:, 0], final_state


def _scan(inputs: Mamba3Inputs, chunk_size: int, backend: str, wanted: bool) -> tuple[Tensor, Mamba3State | None]:
    """y (batch, length, rank, heads, headdim), without the rank axis under mimo_o, and the final state if `wanted`."""
    x, dt, A, B, C, trap, angles, D, z, dt_bias, B_bias, C_bias, mimo_x, mimo_z, mimo_o, state, packing, _, _ = inputs
    if packing is not None and not torch.compiler.is_compiling():
        sequence_bounds(x.shape[0], x.shape[1], packing)  # refuses wrong bounds before they are used as indices
    heads, rank = x.shape[2], B.shape[2]
    before = state if state is not None or (backend in WHOLE_KERNELS and not wanted) else _zero_state(inputs)
    if backend in WHOLE_KERNELS:
        return whole_scan(inputs, before, chunk_size, backend, wanted)
    assert before is not None
    if dt_bias is not None:
        dt = dt + dt_bias
    if inputs.dt_softplus:
        dt = F.softplus(dt)
    own = torch.sigmoid(trap)

    angle, last_angle = accumulate(math.pi * torch.tanh(angles) * dt[..., None], before.angle, packing)
    k, q = (
        rotate(per_head(t.to(A.dtype), bias, heads), angle[:, :, None], inputs.interleaved)
        for t, bias in ((B, B_bias), (C, C_bias))
    )  # (batch, length, rank, heads, state)
    v = per_rank(x.to(A.dtype), mimo_x, rank)  # (batch, length, rank, heads, headdim)
    previous = outer(per_rank(before.v.to(A.dtype), mimo_x, rank), before.k)
    y, ssm = recurrence(v, k, q, dt * A, own * dt, (1 - own) * dt, before.ssm, previous, packing, chunk_size, backend)

    if D is not None:
        y = y + D[:, None] * v
    if z is not None:
        y = y * F.silu(per_rank(z.to(A.dtype), mimo_z, rank))
    if mimo_o is not None:
        y = (y * mimo_o.transpose(0, 1)).sum(2)
    return y.to(x.dtype), Mamba3State(last_angle, ssm, last(k, before.k, packing), last(x, before.v, packing))


def _state_shapes(inputs: Mamba3Inputs) -> dict[str, tuple[int, ...]]:
    (batch, _, heads, headdim), (rank, _, state), pairs = inputs.x.shape, inputs.B.shape[2:], inputs.angles.shape[3]
    sequences = sequence_count(batch, inputs.cu_seqlens)
    return {
        "angle": (sequences, heads, pairs),
        "ssm": (sequences, heads, headdim, state),
        "k": (sequences, rank, heads, state),
        "v": (sequences, heads, headdim),
    }


def _zero_state(inputs: Mamba3Inputs) -> Mamba3State:
    shapes, wide, narrow = _state_shapes(inputs), inputs.A, inputs.x
    return Mamba3State(
        angle=wide.new_zeros(shapes["angle"]),
        ssm=wide.new_zeros(()).expand(shapes["ssm"]),  # large, and added to something or not looked at
        k=wide.new_zeros(shapes["k"]),
        v=narrow.new_zeros(shapes["v"]),
    )


def _check(inputs: Mamba3Inputs, chunk_size: int | None) -> None:
    x, B, angles, state = inputs.x, inputs.B, inputs.angles, inputs.initial_state
    named = {name: getattr(inputs, name) for name in (*_NARROW, *_WIDE)}
    carried = {} if state is None else {f"initial_state.{name}": t for name, t in state._asdict().items()}
    dispatch.check_tensors(**named, **carried)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (batch, length, heads, headdim), got {tuple(x.shape)}")
    if B.dim() != 5:
        raise ValueError(f"B must have shape (batch, length, [rank,] groups, state), got {tuple(B.shape)}")
    if angles.dim() != 4:
        raise ValueError(f"angles must have shape (batch, length, [heads,] pairs), got {tuple(angles.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, heads, headdim = x.shape
    rank, groups, size = B.shape[2:]
    pairs = angles.shape[3]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"the groups of B must divide heads: got {groups} groups for {heads} heads")
    if 2 * pairs > size or (not inputs.interleaved and size % 2 != 0):
        raise ValueError(f"{pairs} angles can't turn the pairs of a state of {size}")
    for name in ("dt", "A", "trap"):
        dispatch.check_shape(name, named[name], (batch, length, heads), "(batch, length, heads)")
    dispatch.check_shape("z", inputs.z, (batch, length, heads, headdim), "(batch, length, heads, headdim)")
    for name in ("B", "C"):
        spelled = "(batch, length, [rank,] groups, state)"
        dispatch.check_shape(name, named[name], (batch, length, rank, groups, size), spelled)
    if tuple(angles.shape[:3]) not in ((batch, length, 1), (batch, length, heads)):
        raise ValueError(
            f"angles must have shape (batch, length, [heads,] pairs) = {(batch, length, heads, pairs)}, "
            f"got {tuple(angles.shape)}"
        )
    for name in ("D", "dt_bias"):
        dispatch.check_shape(name, named[name], (heads,), "(heads,)")
    for name in ("B_bias", "C_bias"):
        dispatch.check_shape(name, named[name], (heads, rank, size), "(heads, rank, state)")
    for name in ("mimo_x", "mimo_z", "mimo_o"):
        dispatch.check_shape(name, named[name], (heads, rank, headdim), "(heads, rank, headdim)")
    check_packing(batch, inputs.cu_seqlens)
    if state is not None:
        axes = ("heads, pairs", "heads, headdim, state", "rank, heads, state", "heads, headdim")
        for (name, tensor), shape, spelled in zip(carried.items(), _state_shapes(inputs).values(), axes, strict=True):
            dispatch.check_shape(name, tensor, shape, f"(sequences, {spelled})")


def _sums_dtype(inputs: Mamba3Inputs) -> torch.dtype:
    carried = () if inputs.initial_state is None else inputs.initial_state
    return dispatch.accumulation_dtype(*(getattr(inputs, name) for name in (*_NARROW, *_WIDE)), *carried)


def _with_common_dtypes(inputs: Mamba3Inputs, wide: torch.dtype, backend: str) -> Mamba3Inputs:
    """x, B, C, z and the carried v in one dtype; everything else in that of sums, but what kernels take in any."""
    state = inputs.initial_state
    narrow = wide if wide == torch.float64 else dispatch.common_dtype(*(getattr(inputs, name) for name in _NARROW))
    left = ("dt", "A", "trap", "angles") if backend == "triton" else ()
    cast: dict[str, Any] = {name: dispatch.cast(getattr(inputs, name), narrow) for name in _NARROW}
    cast |= {name: dispatch.cast(getattr(inputs, name), wide) for name in _WIDE if name not in left}
    if state is not None:
        state = Mamba3State(state.angle.to(wide), state.ssm.to(wide), state.k.to(wide), state.v.to(narrow))
    return inputs._replace(**cast, initial_state=state)
