"""The scan of Mamba-3 on the GPU: what is launched, and in which order.

Forward: what the steps weigh, chunk by chunk (prepare), angles before every chunk (carry_turns), keys and queries of
every head (mamba3_keys), and one walk along the chunks, the state in registers (mamba3_outputs), that keeps the state
before every chunk for the backward. Backward: the gradient of the state after every chunk (mamba3_walk), then all
gradients of a chunk in one kernel (mamba3_gradients), of B and C from those of keys and queries (mamba3_keys), and of
speeds and steps from those of the angles (mamba3_angles).

The account for (batch, length, heads, headdim, state) = (8, 2048, 32, 64, 128) in bfloat16, chunks of 64 steps, with z
and 32 pairs that turn. x, z, B, C and y once are 210 MB. Keys and queries of every head are 268 MB, states 134 MB.
Forward: keys and queries written and read, x and z read, y written: 0.74 GB, and 134 MB of states that are kept.
Backward: keys and queries written again; queries, z, grad_y read and the states' gradients written; then all of these
read, grad_x and grad_z written (67 MB each), the gradients of keys and queries written and read (268 MB each way),
those of the angles (67 MB each way): 2.2 GB. Products are 38 GFLOP forward and 110 GFLOP backward, below the bytes.
"""

import torch
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import mamba3_shapes
from mambakit.ops.triton.mamba3_gradients import gradients
from mambakit.ops.triton.mamba3_launches import Scan, row_size


def forward(inputs: WholeScanInputs, y: Tensor, final_state: Tensor, kept_states: Tensor, carries: Tensor) -> None:
    """Fill y, the final state and, for the backward, the states and angles before every chunk."""
    scan = Scan(inputs)
    if inputs.speeds is not None and carries.shape[0] == 0:
        carries = mamba3_shapes.kept_angles(inputs, True)
    scan.prepare(carries)
    scan.carry_turns(carries)
    keys, queries = scan.keys_and_queries(carries)
    scan.walk_outputs(keys, queries, y, final_state, kept_states)


def backward(
    inputs: WholeScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: WholeScanInputs
) -> None:
    """Fill `grads`."""
    scan = Scan(inputs)
    size, given = scan.size, scan.given
    kept_states, carries = kept
    scan.prepare(None)
    keys, queries = scan.keys_and_queries(carries)
    grad_y = grad_y.contiguous()
    kept_grads = torch.empty_like(kept_states)
    scan.walk_back(queries, grad_y, grad_final_state.contiguous(), grads.initial_state, kept_grads)
    if not size.slots:
        for tensor in grads:
            if isinstance(tensor, Tensor) and tensor is not grads.initial_state:
                tensor.zero_()
        return

    partial = {name: scan.partial(getattr(grads, name)) for name in ("D", "up", "gate", "down")}
    grad_angles = None
    if inputs.speeds is not None:
        grad_angles = inputs.log_decay.new_empty(size.rows, size.heads, size.pairs)
    grad_keys, grad_queries = torch.empty_like(keys), torch.empty_like(queries)
    gradients[(size.slots * size.heads,)](
        *scan.rows("x"),
        keys,
        queries,
        *scan.rows("z"),
        grad_y,
        row_size(grad_y),
        *(given[name] for name in ("up", "gate", "down")),
        *scan.skip,
        *scan.runs,
        kept_states,
        kept_grads,
        grads.x,
        grads.z,
        *partial.values(),
        grad_keys,
        grad_queries,
        grads.log_decay,
        grads.scale,
        grads.own,
        grad_angles,
        *scan.table,
        size.length,
        size.heads,
        size.headdim,
        size.rank,
        size.pairs,
        RANKED=inputs.down is None,
        **scan.tiles,
        **scan.block("gradients", whole=True),
    )
    for name, parts in partial.items():
        if parts is not None:
            torch.sum(parts, 0, out=getattr(grads, name))
    scan.vector_gradients(grad_keys, grad_queries, grad_angles, carries, grads)
