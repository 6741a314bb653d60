"""The scan of Mamba-3 as one operator, `mambakit::mamba3_scan`: keys, turns, recurrence, gates.

What it leaves to others is small: the weights of the trapezoid's rule, one number for each step and head, and what is
carried from one call to the next, which `ops.mamba3_recurrence` derives.
"""

import torch
from torch import Tensor

from mambakit.ops import operator, triton
from mambakit.ops.cpu import mamba3 as cpu
from mambakit.ops.mamba3_inputs import Mamba3Inputs, Mamba3State, WholeScanInputs, outer, per_head, per_rank
from mambakit.ops.mamba3_recurrence import first, last
from mambakit.ops.mamba3_weights import weights
from mambakit.ops.packing import sequence_count
from mambakit.ops.rotation import rotate, wrapped
from mambakit.ops.triton import mamba3_shapes


def whole_scan(
    inputs: Mamba3Inputs, before: Mamba3State | None, chunk_size: int, backend: str, wanted: bool
) -> tuple[Tensor, Mamba3State | None]:
    """y (batch, length, rank, heads, headdim), without the rank axis under mimo_o, and the final state if `wanted`.

    Args:
        inputs: those of the scan.
        before: its initial state, zeros where none was given; not needed where it was not and none is wanted.
        chunk_size: steps that go into one matrix product.
        backend: one of those registered.
        wanted: whether the final state is.
    """
    x, _, _, B, C, _, angles, D, z, _, B_bias, C_bias, mimo_x, mimo_z, mimo_o, state, packing, _, _ = inputs
    heads, headdim, rank, turning = *x.shape[2:], B.shape[2], angles.shape[3] > 0
    log_decay, scale, own, dt, speeds = weights(inputs, backend)
    ssm = None
    if state is not None:
        previous = outer(per_rank(state.v.to(dt.dtype), mimo_x, rank), state.k)
        ssm = state.ssm + first(dt - own, packing)[..., None, None] * previous
    y, ssm = _run(
        WholeScanInputs(
            x,
            B,
            C,
            z,
            log_decay,
            scale,
            own,
            None if D is None else D[:, None].expand(heads, headdim),
            mimo_x,
            None if z is None else mimo_z,
            mimo_o,
            B_bias,
            C_bias,
            speeds if turning else None,
            dt if turning else None,
            state.angle if turning and state is not None else None,
            ssm,
            packing,
            inputs.interleaved,
            chunk_size,
        ),
        backend,
    )
    if not wanted:
        return y, None
    assert before is not None
    angle = wrapped(_turned(speeds, dt, packing) + before.angle).to(dt.dtype)
    k = before.k
    if x.shape[1] > 0:
        row = last(B, B.new_zeros(angle.shape[0], *B.shape[2:]), packing).to(dt.dtype)
        k = rotate(per_head(row, B_bias, heads), angle[:, None], inputs.interleaved)
        if packing is not None:
            k = torch.where((packing[1:] == packing[:-1])[:, None, None, None], before.k, k)
    return y, Mamba3State(angle, ssm, k, last(x, before.v, packing))


def _turned(speeds: Tensor, dt: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How far each sequence turned in all, (sequences, heads, pairs) in float64."""
    speeds, dt = speeds.double(), dt.double()
    if cu_seqlens is None:
        if speeds.shape[2] == 1:
            return dt.mT @ speeds.squeeze(2)
        return (speeds * dt[..., None]).sum(1)
    rows = torch.arange(dt.shape[1], dtype=cu_seqlens.dtype, device=dt.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)  # (length,)
    turns = (speeds * dt[..., None])[0]
    return turns.new_zeros(cu_seqlens.shape[0] - 1, *turns.shape[1:]).index_add(0, sequence, turns)


def _outputs(inputs: WholeScanInputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """y, the final state, and what is kept for the backward: the states (slots, ...), and on the GPU the angles."""
    (batch, length, heads, headdim), (rank, _, state) = inputs.x.shape, inputs.B.shape[2:]
    sequences = sequence_count(batch, inputs.cu_seqlens)
    ranks = (rank,) if inputs.down is None else ()
    wide = inputs.log_decay
    y = inputs.x.new_empty(batch, length, *ranks, heads, headdim)
    final_state = wide.new_empty(sequences, heads, headdim, state)
    if backend == "triton":
        return y, final_state, *mamba3_shapes.kept(inputs, keep)
    slots = batch * length // inputs.chunk_size + sequences if keep else 0
    return y, final_state, wide.new_empty(slots, heads, headdim, state), wide.new_empty(0)


KERNELS = {"triton": triton.Operation("mamba3"), "cpu": cpu}
_run = operator.register("mamba3_scan", WholeScanInputs, _outputs, backends=KERNELS, kept=2)
