"""The scan of Mamba-2 on the GPU: which kernels run, on what, in which order.

Forward: dt and the sums of the decays' logarithms (prepare_steps), then one walk along each segment of chunks with the
state in registers (walk_outputs): x, B, C are read once, y is written once, no state and no product of a chunk leaves
the chip. Where batch times heads don't fill the chip, sequences are cut into segments; what each adds to the state
comes first (walk_states: another read of x and B), and states are handed on between them (pass_states).

Backward: the forward keeps the state before every chunk of 64 steps in the dtype of x, in which the tensor cores take
it. The gradients of the states walk back alone (walk_states: reads dy and C, writes as many states), and then all
chunks are independent: chunk_gradients for dx and what dt needs, with C B^T formed once for several heads of a group,
key_gradients for dB and dC, summed over heads in registers. What the few programs of a group leave is summed in a fixed
order (sum_splits), so that every result has the same bits each time. Last come the gradients of dt, A and dt_bias
(finish_steps).

Account, bfloat16, b = batch * length * heads steps of headdim P = 64, state N = 128, chunks of Q = 64:

                    bytes a step and head               products a step and head (operations)
    walk_outputs    4 P (+ 2 P N / Q kept)     256 (+256)    2 Q N + 2 Q P + 4 P N            56 Ki
    walk_states     2 P + 2 P N / Q            384           2 P N                            16 Ki
    chunk_gradients 6 P + 4 P N / Q            896           4 Q P + 4 P N                    48 Ki
    key_gradients   4 P + 4 P N / Q            768           4 P N (two launches)             32 Ki

so (8, 2048, 64, 64, 128), a million of b, moves 0.27 GB forward and, with what is kept, 2.7 GB forward and backward. A
larger chunk would halve the states' share, and its accumulators don't fit the registers. Segments cost walk_states
once more, without the kept states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton.ssd_backward import chunk_gradients
from mambakit.ops.triton.ssd_forward import walk_outputs
from mambakit.ops.triton.ssd_launches import Call, given_or, split
from mambakit.ops.triton.ssd_limits import filled
from mambakit.ops.triton.state_passing import pass_states

_DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
_CONTIGUOUS = torch.contiguous_format


def forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    """Fill y, the final state and, unless they are empty, the states before every chunk."""
    if final_state.numel() == 0:
        return
    whole = _in_whole_blocks(inputs)
    if whole is inputs:
        _forward(inputs, y, final_state, kept_states)
        return
    headdim, state = final_state.shape[2:]
    wide_y = torch.empty_like(whole.x, memory_format=torch.contiguous_format)
    wide_state = final_state.new_empty(*final_state.shape[:2], whole.x.shape[3], whole.B.shape[3])
    _forward(whole, wide_y, wide_state, kept_states)
    y.copy_(wide_y[..., :headdim])
    final_state.copy_(wide_state[..., :headdim, :state])


def backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    """Fill `grads`."""
    if grad_final_state.numel() == 0 or grad_y.numel() == 0:
        _without_steps(grad_final_state, grads)
        return
    whole = _in_whole_blocks(inputs)
    if whole is inputs:
        _backward(inputs, kept, grad_y, grad_final_state, grads)
        return
    rows, states = whole.x.shape[3] - inputs.x.shape[3], whole.B.shape[3] - inputs.B.shape[3]
    unfilled: dict[str, Any] = {
        name: torch.empty_like(getattr(whole, name), memory_format=_CONTIGUOUS)
        for name in _DIFFERENTIABLE
        if getattr(grads, name) is not None
    }
    wide = grads._replace(**unfilled)
    wide_grad_state = F.pad(grad_final_state, (0, states, 0, rows))
    _backward(whole, kept, F.pad(grad_y, (0, rows)), wide_grad_state, wide)
    for name in _DIFFERENTIABLE:
        grad: Tensor | None = getattr(grads, name)
        if grad is not None:
            grad.copy_(getattr(wide, name)[tuple(slice(size) for size in grad.shape)])


def _in_whole_blocks(inputs: SsdInputs) -> SsdInputs:
    """The inputs themselves, or in half precision filled up with zeros to whole blocks of aligned rows.

    Triton 3.6 gave wrong states on Hopper for rows of 24 and 40 numbers, read one by one, in blocks of 32 and 64.
    """
    x, _, _, B, C, D, z, _, initial, *_ = inputs
    if x.dtype == torch.float32:
        return inputs
    headdim, state = filled(x.shape[3], B.shape[3], x.dtype)
    rows, states = headdim - x.shape[3], state - B.shape[3]
    read = [t for t in (x, B, C, z) if t is not None]
    if not rows and not states and all(_aligned(t) for t in read):
        return inputs
    return inputs._replace(
        x=_fill(x, rows),
        B=_fill(B, states),
        C=_fill(C, states),
        D=None if D is None else F.pad(D, (0, rows)),
        z=None if z is None else _fill(z, rows),
        initial_state=None if initial is None else F.pad(initial, (0, states, 0, rows)),
    )


def _fill(tensor: Tensor, more: int) -> Tensor:
    """The tensor with `more` zeros at the end of its rows, which then lie aligned."""
    return F.pad(tensor, (0, more)) if more else tensor.clone(memory_format=torch.contiguous_format)


def _aligned(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return strides[3] == 1 and all(s % 16 == 0 for s in strides[:3]) and tensor.data_ptr() % 16 == 0


def _forward(inputs: SsdInputs, y: Tensor, final_state: Tensor, kept_states: Tensor) -> None:
    call = Call(inputs)
    layout, heads = call.layout, inputs.x.shape[2]
    with torch.cuda.device_of(y):
        call.prepare()
        initial = call.initial
        if layout.segmented:
            initial, factors = call.parts()
            call.walk_states(call.x, call.B, None, None, initial, factors, None, reverse=False)
            pass_states(initial, factors, call.initial, final_state, layout.first_segment)
        walk_outputs[(heads, call.blocks, layout.segments)](
            call.x,
            call.B,
            call.C,
            given_or(call.z, call.x),
            given_or(call.D, call.runs),
            call.runs,
            given_or(initial, call.runs),
            y,
            final_state,
            kept_states,
            given_or(layout.segment_table, call.runs),
            *call.x.stride()[:3],
            *call.B.stride()[:3],
            *call.C.stride()[:3],
            *given_or(call.z, call.x).stride()[:3],
            *_strides_of(call.D),
            *call.walk_sizes,
            CHUNK=layout.chunk,
            BLOCK_P=call.config.block_headdim,
            BLOCK_N=call.block_state,
            HAS_Z=call.z is not None,
            HAS_D=call.D is not None,
            HAS_INITIAL=initial is not None,
            WRITE_FINAL=not layout.segmented,
            KEEP=kept_states.shape[0] > 0,
            FINE=call.fine,
            PACKED=layout.segment_table is not None,
            ALIGN=call.align,
            PRECISION=call.precision,
            STAGES=call.config.stages_outputs,
            num_warps=call.config.warps_outputs,
        )


def _backward(
    inputs: SsdInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: SsdInputs
) -> None:
    call = Call(inputs)
    layout, x = call.layout, call.x
    heads, groups = x.shape[2], call.B.shape[2]
    dy, ending = grad_y.contiguous(), grad_final_state.contiguous()
    absent = call.runs
    with torch.cuda.device_of(x):
        call.prepare()
        state_grads = torch.empty_like(kept[0])
        d_initial = grads.initial_state
        if layout.segmented:
            parts, factors = call.parts()
            call.walk_states(dy, call.C, call.z, None, parts, factors, None, reverse=True)
            pass_states(parts, factors, ending, d_initial, layout.first_segment, reverse=True)
            call.walk_states(dy, call.C, call.z, parts, None, None, state_grads, reverse=True)
        else:
            call.walk_states(dy, call.C, call.z, ending, d_initial, None, state_grads, reverse=True)

        share = heads // groups
        programs = max(1, layout.chunks * groups)
        splits, heads_of_program = split(share, programs, call.config.gradient_programs_wanted)
        dpairs = call.runs.new_empty(splits, layout.chunks, groups, layout.chunk, layout.chunk)
        steps = call.runs.new_empty(4, call.blocks, heads, layout.places)
        through = call.runs.new_empty(call.blocks, heads, layout.chunks)
        dD = None if call.D is None else call.runs.new_empty(layout.chunks, *call.D.shape)
        chunk_gradients[(groups * splits, layout.chunks)](
            x,
            call.B,
            call.C,
            given_or(call.z, x),
            given_or(call.D, absent),
            dy,
            call.runs,
            kept[0],
            state_grads,
            grads.x,
            dpairs,
            given_or(grads.z, x),
            given_or(dD, absent),
            *steps,
            through,
            given_or(layout.chunk_table, absent),
            *x.stride()[:3],
            *call.B.stride()[:3],
            *call.C.stride()[:3],
            *given_or(call.z, x).stride()[:3],
            *_strides_of(call.D),
            *call.chunk_sizes,
            splits,
            heads_of_program,
            BLOCKS=call.blocks,
            CHUNK=layout.chunk,
            BLOCK_P=call.config.block_headdim,
            BLOCK_N=call.block_state,
            HAS_Z=call.z is not None,
            HAS_D=call.D is not None,
            FINE=call.fine,
            PACKED=layout.chunk_table is not None,
            ALIGN=call.align,
            PRECISION=call.precision,
            STAGES=call.config.stages_gradients,
            num_warps=call.config.warps_gradients,
        )
        call.key_gradients(x, call.C, None, state_grads, dpairs, grads.B, source=True)
        call.key_gradients(dy, call.B, call.z, kept[0], dpairs, grads.C, source=False)
        call.finish(steps, through, grads)
        if dD is not None:
            torch.sum(dD, 0, out=grads.D)


def _without_steps(grad_final_state: Tensor, grads: SsdInputs) -> None:
    """The gradients where there is nothing to scan: the final state is the initial one."""
    for name in _DIFFERENTIABLE[:-1]:
        grad: Tensor | None = getattr(grads, name)
        if grad is not None:
            grad.zero_()
    if grads.initial_state is not None:
        grads.initial_state.copy_(grad_final_state)


def _strides_of(D: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if D is None else D.stride()
