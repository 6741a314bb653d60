"""The selective scan of Mamba-1 (arXiv 2312.00752, equation 2).

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t  = (C_t h_t + D u_t) silu(z_t)

`mambakit.ops.reference.selective_scan` is the definition. The other backends run the torch operator
`mambakit::selective_scan`, whose backward recomputes the states of one chunk at a time from the state kept before
every `CHUNK`-th step: memory is linear in the length, and no (batch, length, dim, state) tensor is ever kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops import dispatch, operator, triton
from mambakit.ops.cpu import selective_scan as cpu
from mambakit.ops.inputs import (
    CHUNK,
    TRITON_INTERVAL,
    TRITON_MOST_STATES,
    TRITON_STATES_TOGETHER,
    ScanInputs,
)
from mambakit.ops.packing import check_packing, sequence_count
from mambakit.ops.portable import selective_scan as portable
from mambakit.ops.reference.selective_scan import selective_scan as reference
from mambakit.ops.triton.counting import ceil_div

_GPU = triton.Operation("selective_scan")
_KERNELS = {"triton": _GPU, "cpu": cpu, "portable": portable}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan; differentiable in every tensor, the states included.

    Args:
        u, delta, z: (batch, length, dim).
        A: (dim, state); negative for a state that decays.
        B, C: (batch, length, state), or (batch, length, groups, state) where `groups` divides `dim` and each group
            serves `dim / groups` neighbouring channels.
        D, delta_bias: (dim,).
        delta_softplus: pass delta (its bias added) through softplus.
        initial_state: (batch, dim, state); zero if None.
        return_final_state: also return the state after the last step.
        cu_seqlens: (sequences + 1,) integers from 0 to length: packed sequences. Batch is then 1, and states are
            (sequences, dim, state).
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        y (batch, length, dim) in the common dtype of u, delta, B, C and z; with `return_final_state`, (y, state) with
        the state in float32 (float64 where any input is).

    Raises:
        ValueError: a shape, a backend or cu_seqlens that does not fit; TypeError: a dtype that is not floating.

    >>> u, delta = torch.randn(2, 2, 100, 8).abs().unbind()
    >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 100, 4), torch.randn(2, 100, 4)
    >>> y, state = selective_scan(u, delta, A, B, C, return_final_state=True)
    >>> y.shape, state.shape
    (torch.Size([2, 100, 8]), torch.Size([2, 8, 4]))
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus)
    _check(inputs, "batch, length")
    inputs = _with_common_dtypes(inputs)
    name = dispatch.choose(u.device, backend, (*_KERNELS, "reference"), _refusal_of(inputs))
    y, final_state = _evaluated(inputs, name)
    return (y, final_state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan` from `state` (batch, dim, state): returns (y, the next state).

    u, delta, z and y are (batch, dim); B and C (batch, [groups,] state); the rest is as in `selective_scan`.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, state, None, delta_softplus)
    _check(inputs, "batch")
    inputs = _with_common_dtypes(inputs)
    name = dispatch.choose(u.device, backend, (*_KERNELS, "reference"), _refusal_of(inputs))
    if name == "triton" and inputs.u.numel() > 0 and operator.runs_plainly(inputs):
        y = torch.empty_like(inputs.u, memory_format=torch.contiguous_format)
        final_state = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
        _GPU.one_step(inputs, y, final_state)
        return y, final_state
    u, delta, B, C = (t[:, None] for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z[:, None]
    y, final_state = _evaluated(inputs._replace(u=u, delta=delta, B=B, C=C, z=z), name)
    return y[:, 0], final_state


def _evaluated(inputs: ScanInputs, backend: str) -> tuple[Tensor, Tensor]:
    if backend != "triton" or not operator.nobody_looks_on(inputs):
        inputs = _with_groups(inputs)
    if backend == "reference":
        return reference(inputs)
    if backend == "triton" and inputs.A.shape[1] > TRITON_STATES_TOGETHER:
        return _in_parts(inputs, TRITON_STATES_TOGETHER)
    return _run(inputs, backend)


def _in_parts(inputs: ScanInputs, most: int) -> tuple[Tensor, Tensor]:
    """The scan as the sum of scans over at most `most` states each, on the GPU: no state knows of another."""
    u, _, A, B, C, D, z, _, initial_state, _, _ = inputs
    parts = ceil_div(A.shape[1], most)
    size = min(ceil_div(A.shape[1], 8 * parts) * 8, most)  # a multiple of what the kernels load at a time
    pieces = [t.split(size, dim=-1) for t in (A, B, C)]
    initial_states = [None] * parts if initial_state is None else initial_state.split(size, dim=-1)
    bare = inputs._replace(D=None, z=None)
    results = [
        _run(bare._replace(A=a, B=b, C=c, initial_state=h), "triton")
        for a, b, c, h in zip(*pieces, initial_states, strict=True)
    ]
    y = results[0][0].to(A.dtype)
    for further, _ in results[1:]:
        y = y + further
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(A.dtype))
    return y.to(u.dtype), torch.cat([final_state for _, final_state in results], dim=-1)


def _check(inputs: ScanInputs, rows: str) -> None:
    """Raise unless the inputs fit each other; `rows` spells the axes of u before its channels."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, _ = inputs
    dispatch.check_tensors(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    axes = rows.count(",") + 2
    if u.dim() != axes:
        raise ValueError(f"u must have shape ({rows}, dim), got {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A must have shape (dim, state), got {tuple(A.shape)}")
    if B.dim() not in (axes, axes + 1):
        raise ValueError(f"B must have shape ({rows}, [groups,] state), got {tuple(B.shape)}")
    *before, dim = u.shape
    groups, state = B.shape[-2] if B.dim() > axes else 1, A.shape[1]
    if groups == 0 or dim % groups != 0:
        raise ValueError(f"the groups of B must divide dim: got {groups} groups for dim {dim}")
    dispatch.check_shape("delta", delta, (*before, dim), f"({rows}, dim)")
    dispatch.check_shape("z", z, (*before, dim), f"({rows}, dim)")
    dispatch.check_shape("A", A, (dim, state), "(dim, state)")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == axes and groups == 1:
            dispatch.check_shape(name, tensor, (*before, state), f"({rows}, state)")
        else:
            dispatch.check_shape(name, tensor, (*before, groups, state), f"({rows}, groups, state)")
    dispatch.check_shape("D", D, (dim,), "(dim,)")
    dispatch.check_shape("delta_bias", delta_bias, (dim,), "(dim,)")
    check_packing(before[0], cu_seqlens)
    sequences = sequence_count(before[0], cu_seqlens)
    dispatch.check_shape("initial_state", initial_state, (sequences, dim, state), "(sequences, dim, state)")


def _with_groups(inputs: ScanInputs) -> ScanInputs:
    """B and C with an axis for their groups. The GPU's kernels do without, for a view costs as much as a launch."""
    B, C = (t.unsqueeze(2) if t.dim() == 3 else t for t in (inputs.B, inputs.C))
    return inputs._replace(B=B, C=C)


def _refusal_of(inputs: ScanInputs) -> Callable[[str], str | None]:
    """Of a backend's name, why it does not take these inputs."""
    state = inputs.A.shape[1]

    def refusal(name: str) -> str | None:
        if name == "triton" and inputs.u.dtype == torch.float64:
            return "its kernels of the selective scan take no float64"
        if name == "triton" and not 0 < state <= TRITON_MOST_STATES:
            return f"its kernels of the selective scan take 1 to {TRITON_MOST_STATES} states, and A has {state}"
        return None

    return refusal


def _with_common_dtypes(inputs: ScanInputs) -> ScanInputs:
    """Activations in one dtype; A, D, delta_bias and the state in the dtype of sums."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    cast = dispatch.cast
    wide = dispatch.accumulation_dtype(*inputs[:9])
    narrow = wide if wide == torch.float64 else dispatch.common_dtype(u, delta, B, C, z)
    return ScanInputs(
        u=cast(u, narrow),
        delta=cast(delta, narrow),
        A=cast(A, wide),
        B=cast(B, narrow),
        C=cast(C, narrow),
        D=cast(D, wide),
        z=cast(z, narrow),
        delta_bias=cast(delta_bias, wide),
        initial_state=cast(initial_state, wide),
        cu_seqlens=cu_seqlens,
        delta_softplus=delta_softplus,
    )


def _outputs(inputs: ScanInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """y, the final state, and the states kept for the backward, (slots, state, dim)."""
    u, A = inputs.u, inputs.A
    batch, length, dim = u.shape
    sequences = sequence_count(batch, inputs.cu_seqlens)
    interval = TRITON_INTERVAL if backend == "triton" else CHUNK
    slots = batch * length // interval + sequences if keep else 0
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, A.new_empty(sequences, dim, A.shape[1]), A.new_empty(slots, A.shape[1], dim)


_run = operator.register("selective_scan", ScanInputs, _outputs, _KERNELS, kept=1)
