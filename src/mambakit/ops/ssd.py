"""The scan of Mamba-2, structured state-space duality (arXiv 2405.21060).

    dt_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t  = (h_t C_t + D x_t) silu(z_t)

`mambakit.ops.reference.ssd` is the definition. The other backends run the torch operator `mambakit::ssd`, which works
in chunks of matrix products and whose backward forms each chunk again from the state kept before it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mambakit.ops import dispatch, operator, triton
from mambakit.ops.cpu import ssd as cpu
from mambakit.ops.inputs import SsdInputs
from mambakit.ops.packing import check_packing, sequence_count
from mambakit.ops.portable import ssd as portable
from mambakit.ops.reference.ssd import ssd as reference
from mambakit.ops.triton import ssd_limits

_STEP = triton.Kernels("ssd_step")
_KERNELS = {"triton": triton.Operation("ssd"), "cpu": cpu, "portable": portable}
_CHUNK_SIZE = {"cpu": 64}  # a chunk of 64 stays in the caches
_CHUNK_SIZE_ELSEWHERE = 256  # few and large products, as in mamba-ssm


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2; differentiable in every tensor, the states included.

    Args:
        x, z: (batch, length, heads, headdim).
        dt: (batch, length, heads).
        A: (heads,); negative for a state that decays.
        B, C: (batch, length, state), or (batch, length, groups, state) where `groups` divides `heads` and each group
            serves `heads / groups` neighbouring heads.
        D: (heads,) or (heads, headdim).
        dt_bias: (heads,).
        dt_softplus: pass dt (its bias added) through softplus.
        dt_limit: dt is clamped to this interval, after softplus; its gradient is zero outside.
        chunk_size: steps that go into one matrix product, None for a good choice. It changes the time taken and the
            memory, not the result; the reference goes step by step whatever it is, and the GPU's kernels take the
            nearest power of two from 16 to 64 that is not greater, or 16.
        initial_state: (batch, heads, headdim, state); zero if None.
        return_final_state: also return the state after the last step.
        cu_seqlens: (sequences + 1,) integers from 0 to length: packed sequences. Batch is then 1, and states are
            (sequences, heads, headdim, state).
        backend: "triton", "cpu", "portable" or "reference"; None picks the fastest for the device.

    Returns:
        y (batch, length, heads, headdim) in the common dtype of x, dt, B, C and z; with `return_final_state`,
        (y, state) with the state in float32 (float64 where any input is).

    Raises:
        ValueError: a shape, a limit, a chunk size, a backend or cu_seqlens that does not fit; TypeError: a dtype that
            is not floating.

    >>> x, dt, A = torch.randn(2, 100, 8, 4), torch.rand(2, 100, 8), -torch.rand(8)
    >>> B, C = torch.randn(2, 2, 100, 16).unbind()
    >>> y, state = ssd(x, dt, A, B, C, return_final_state=True)
    >>> y.shape, state.shape
    (torch.Size([2, 100, 8, 4]), torch.Size([2, 8, 4, 16]))
    """
    B, C = (t.unsqueeze(2) if t.dim() == 3 else t for t in (B, C))
    if D is not None and D.dim() == 1 and x.dim() == 4:
        D = D[:, None].expand(-1, x.shape[3])
    chunk = _CHUNK_SIZE.get(x.device.type, _CHUNK_SIZE_ELSEWHERE) if chunk_size is None else chunk_size
    inputs = SsdInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, *dt_limit, chunk)
    _check(inputs)
    inputs = _with_common_dtypes(inputs)
    name = dispatch.choose(x.device, backend, (*_KERNELS, "reference"), _case_refusal(inputs))
    y, final_state = reference(inputs) if name == "reference" else _run(inputs, name)
    return (y, final_state) if return_final_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `ssd` from `state` (batch, heads, headdim, state): returns (y, the next state).

    x, z and y are (batch, heads, headdim); dt (batch, heads); B and C (batch, [groups,] state); the rest is as in
    `ssd`.
    """
    if x.is_cuda or backend == "triton":  # one launch, and none of the checks and casts of a whole sequence twice
        inputs = _step_inputs(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
        if operator.runs_plainly(inputs) and dispatch.accumulation_dtype(*inputs[:9]) == torch.float32:
            _check(inputs)
            if dispatch.choose(x.device, backend, (*_KERNELS, "reference"), _case_refusal(inputs)) == "triton":
                return _STEP.step(inputs, state)
    y, final_state = ssd(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None if z is None else z[:, None],
        dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return y[:, 0], final_state


def _step_inputs(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> SsdInputs:
    """The step as a sequence of length one."""
    B, C = (t[:, None, None] if t.dim() == 2 else t[:, None] for t in (B, C))
    if D is not None and D.dim() == 1 and x.dim() == 3:
        D = D[:, None].expand(-1, x.shape[2])
    z = None if z is None else z[:, None]
    return SsdInputs(x[:, None], dt[:, None], A, B, C, D, z, dt_bias, state, None, dt_softplus, *dt_limit, 1)


def _check(inputs: SsdInputs) -> None:
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, _, dt_min, dt_max, chunk_size = inputs
    dispatch.check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (batch, length, heads, headdim), got {tuple(x.shape)}")
    if B.dim() != 4:
        raise ValueError(f"B must have shape (batch, length, [groups,] state), got {tuple(B.shape)}")
    batch, length, heads, headdim = x.shape
    groups, state = B.shape[2:]
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"the groups of B must divide heads: got {groups} groups for {heads} heads")
    dispatch.check_shape("dt", dt, (batch, length, heads), "(batch, length, heads)")
    dispatch.check_shape("z", z, (batch, length, heads, headdim), "(batch, length, heads, headdim)")
    dispatch.check_shape("A", A, (heads,), "(heads,)")
    dispatch.check_shape("B", B, (batch, length, groups, state), "(batch, length, groups, state)")
    dispatch.check_shape("C", C, (batch, length, groups, state), "(batch, length, groups, state)")
    dispatch.check_shape("D", D, (heads, headdim), "(heads, headdim)")
    dispatch.check_shape("dt_bias", dt_bias, (heads,), "(heads,)")
    if not dt_min <= dt_max:
        raise ValueError(f"dt_limit must be an interval (least, greatest), got ({dt_min}, {dt_max})")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_packing(batch, cu_seqlens)
    states = (sequence_count(batch, cu_seqlens), heads, headdim, state)
    dispatch.check_shape("initial_state", initial_state, states, "(sequences, heads, headdim, state)")


def _case_refusal(inputs: SsdInputs) -> Callable[[str], str | None]:
    def reason(backend: str) -> str | None:
        return ssd_limits.refusal(inputs.x.dtype, inputs.B.shape[3]) if backend == "triton" else None

    return reason


def _with_common_dtypes(inputs: SsdInputs) -> SsdInputs:
    """Activations in one dtype; A, D, dt_bias and the state in the dtype of sums."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, *_ = inputs
    cast = dispatch.cast
    wide = dispatch.accumulation_dtype(*inputs[:9])
    narrow = wide if wide == torch.float64 else dispatch.common_dtype(x, dt, B, C, z)
    return SsdInputs(
        cast(x, narrow),
        cast(dt, narrow),
        cast(A, wide),
        cast(B, narrow),
        cast(C, narrow),
        cast(D, wide),
        cast(z, narrow),
        cast(dt_bias, wide),
        cast(initial_state, wide),
        *inputs[9:],
    )


def _outputs(inputs: SsdInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """y, the final state, and the states kept for the backward, (slots, heads, headdim, state)."""
    x, A = inputs.x, inputs.A
    batch, length, heads, headdim = x.shape
    sequences, state = sequence_count(batch, inputs.cu_seqlens), inputs.B.shape[3]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = A if backend != "triton" else x  # on the GPU in the dtype in which its matrix products take the states
    slots = 0
    if keep and backend == "triton":
        packed = None if inputs.cu_seqlens is None else sequences
        chunk = ssd_limits.chunk_of(inputs.chunk_size, length, x.dtype)
        slots = ssd_limits.kept_chunks(batch, length, packed, chunk, inputs.initial_state is not None)
    elif keep:
        slots = batch * length // inputs.chunk_size + sequences
    inner = (headdim, state) if backend != "triton" else ssd_limits.filled(headdim, state, x.dtype)[::-1]
    return y, A.new_empty(sequences, heads, headdim, state), kept.new_empty(slots, heads, *inner)


_run = operator.register("ssd", SsdInputs, _outputs, backends=_KERNELS, kept=1)
