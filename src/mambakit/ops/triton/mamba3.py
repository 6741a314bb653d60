"""The scan of Mamba-3 on the GPU: what is launched, and in which order.

Forward: what the steps weigh, chunk by chunk (prepare), angles before every chunk (carry_turns), keys and queries of
every head (mamba3_keys), and one walk along the chunks, the state in registers (mamba3_outputs), that keeps the state
before every chunk for the backward. Backward: the gradient of the state after every chunk (mamba3_walk), then those of
values and gates of a chunk (mamba3_value_gradients) and of its keys and queries (mamba3_key_gradients), of B and C from
these (mamba3_keys), and of speeds and steps from those of the angles (mamba3_angles).

A sequence that fits into one chunk and begins afresh has no state before it, and where nothing depends on its last
state no gradient after it: such states are neither kept nor multiplied, and no walk goes back.

The account for (batch, length, heads, headdim, state) = (8, 2048, 32, 64, 128) in bfloat16, chunks of 64 steps, with z
and 32 pairs that turn. x, z, B, C and y once are 210 MB. Keys and queries of every head are 268 MB, states 134 MB.
Forward: keys and queries written and read, x and z read, y written: 0.74 GB, and 134 MB of states that are kept.
Backward: keys and queries written again; queries, z, grad_y read and the states' gradients written; then all of these
read twice, grad_x and grad_z written (67 MB each), the gradients of keys and queries written and read (268 MB each
way), those of the angles (67 MB each way): 2.9 GB. Products are 38 GFLOP forward and 119 GFLOP backward, below the
bytes.
"""

import torch
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import mamba3_shapes
from mambakit.ops.triton.launch import on_device_of
from mambakit.ops.triton.mamba3_call import Scan

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`


def forward(inputs: WholeScanInputs, y: Tensor, final_state: Tensor, kept_states: Tensor, carries: Tensor) -> None:
    """Fill y, the final state and, for the backward, the states and angles before every chunk."""
    with on_device_of(inputs.x):
        scan = Scan(inputs)
        before = None
        if _turned_before(inputs, scan.size.single):
            before = carries if carries.shape[0] else mamba3_shapes.angles(inputs)
        scan.prepare(before)
        if before is not None:
            scan.carry_turns(before)
        keys, queries = scan.keys_and_queries(before)
        scan.walk_outputs(keys, queries, y, final_state, kept_states if kept_states.shape[0] else None)


def backward(
    inputs: WholeScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    grads: WholeScanInputs,
) -> None:
    """Fill `grads`."""
    with on_device_of(inputs.x):
        _backward(inputs, kept, grad_y.contiguous(), grad_final_state, grads)


def _backward(
    inputs: WholeScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_last: Tensor | None,
    grads: WholeScanInputs,
) -> None:
    scan = Scan(inputs, short=grad_last is None)
    size = scan.size
    kept_states = kept[0] if kept[0].shape[0] else None
    carries = kept[1] if _turned_before(inputs, size.single) else None
    scan.prepare(None)
    keys, queries = scan.keys_and_queries(carries)
    kept_grads = None
    if not size.single or grad_last is not None:
        kept_grads = keys.new_empty(size.slots, size.heads, 2 * size.half, size.headdim)
    if kept_grads is not None or grads.initial_state is not None:
        last = None if grad_last is None else grad_last.contiguous()
        scan.walk_back(queries, grad_y, last, grads.initial_state, kept_grads)
    if not size.slots or not size.heads:
        for tensor in grads:
            if isinstance(tensor, Tensor) and tensor is not grads.initial_state:
                tensor.zero_()
        return

    of_parameters = {name: _partial(scan, getattr(grads, name)) for name in ("D", "up", "gate", "down")}
    grad_angles = None
    if scan.speeds is not None:
        grad_angles = scan.wide.new_empty(size.rows, size.heads, size.pairs)
    grad_keys, grad_queries = torch.empty_like(keys), torch.empty_like(queries)
    stateless = kept_states is None and kept_grads is None
    given = (scan.x, keys, queries, scan.z, grad_y, scan.up, scan.gate, scan.down)
    chunks = (scan.bounds, scan.sequence_of_slot)
    scan.launches.value_gradients(stateless)(
        *given, scan.D, scan.runs, kept_states, kept_grads, grads.x, grads.z, *of_parameters.values(),
        grads.log_decay, grads.scale, *chunks,
    )  # fmt: skip
    scan.launches.key_gradients(stateless)(
        *given, scan.runs, kept_states, kept_grads, grad_keys, grad_queries, grads.log_decay, grads.scale, grads.own,
        grad_angles, *chunks,
    )  # fmt: skip
    for name, parts in of_parameters.items():
        if parts is not None:
            torch.sum(parts, 0, out=getattr(grads, name))
    _vector_gradients(scan, grad_keys, grad_queries, grad_angles, carries, grads)


def _vector_gradients(
    scan: Scan,
    grad_keys: Tensor,
    grad_queries: Tensor,
    grad_angles: Tensor | None,
    carries: Tensor | None,
    grads: WholeScanInputs,
) -> None:
    """Of B, C, their biases, speeds, steps and initial angles, from those of the keys and queries."""
    size, launches, wide = scan.size, scan.launches, scan.wide
    biases = [_partial(scan, grad) for grad in (grads.B_bias, grads.C_bias)]
    shares, step_shares, sums = grads.speeds, grads.steps, None
    if grads.speeds is not None and not launches.turns_at_once:
        if scan.layout.speed_heads == 1:
            shares = wide.new_empty(size.groups, *grads.speeds.shape)
        step_shares = wide.new_empty(launches.pair_blocks, size.rows, size.heads)
    if grads.speeds is not None and (not size.single or grads.initial_angle is not None):
        sums = wide.new_empty(size.slots, size.heads, size.pairs, dtype=torch.float64)
    launches.vector_gradients(
        scan.speeds, scan.steps, carries, grad_keys, grad_queries, grad_angles, grads.B, grads.C, *biases, shares,
        step_shares, sums, scan.bounds, scan.sequence_of_slot,
    )  # fmt: skip
    for parts, grad in zip(biases, (grads.B_bias, grads.C_bias), strict=True):
        if parts is not None:
            torch.sum(parts, 0, out=grad)
    if sums is not None:
        launches.later_sums(sums, grads.initial_angle, scan.bounds)
    if grads.speeds is not None and not launches.turns_at_once:
        launches.finish_turns(
            sums, scan.speeds, scan.steps, shares, step_shares, grads.speeds, grads.steps, scan.bounds,
            scan.sequence_of_slot,
        )  # fmt: skip


def _turned_before(inputs: WholeScanInputs, single: bool) -> bool:
    """Whether a chunk may begin at an angle that is not zero."""
    return inputs.speeds is not None and not (single and inputs.initial_angle is None)


def _partial(scan: Scan, grad: Tensor | None) -> Tensor | None:
    """Room for the share that every chunk has in a gradient; a pack's unused slots have none."""
    if grad is None:
        return None
    make = grad.new_empty if scan.bounds is None else grad.new_zeros
    return make(scan.size.slots, *grad.shape)
