"""The selective scan on the GPU: how its kernels fit together.

Forward, where there are many channels or few steps, `arrange_rounds` of B and C, and `split_outputs`: lanes share the
states of a channel, and no sequence is cut up. Elsewhere, parallel over segments of the length:

    segment_states    the state each segment ends in from a state of zero, and the sum of its dt
    carry             from segment to segment: h = exp(A sum dt) h + that state
    outputs           y of each segment from the state it starts in

and where a sequence is one segment, `outputs` alone. For the backward they leave the state every INTERVAL steps.
Backward, in reverse for r, the gradient of the state:

    segment_gradients, carry    r at the end of each segment
    arrange                     A, B and C, small beside the rest, in float32 and in the order of the next
    gradients                   all gradients of a segment; dB and dC per block of channels
    sum_over_channels           dB and dC
    sum_over_segments           dA, dD and the gradient of the bias

The account, for E = batch length dim state and F = batch length dim. Exponentials: E forward, and up to E more in
`segment_states` (the last segment of a sequence needs none); E and up to E backward, where the states are formed once
more from those kept and both directions of a block share its decays; the floor is E forward and E backward. Reads and
writes of F elements: 2 in `segment_states`, 4 in what gives y, 3 and 7 backward, where the floor is 4 and 7; the states
kept for the backward are state / INTERVAL of float32 on top, dB and dC before their sum 2 state / BLOCK. No sum over
states crosses lanes but those that share a channel; those over channels take one exchange between lanes for two values
(`fold`). An exponential takes a scheduler eight cycles and the rest of a step of a state five or so, which makes them
what the forward waits for, once loads are started long enough before: those of activations several steps, B and C, that
the second-level cache holds, one. `gradients` loads one round of states ahead, and has its rows fetched a block ahead.

INTERVAL is 8: blocks of 16 steps keep half as many states, but fill the registers, and ran 20% slower.
"""

import functools

from torch import Tensor

from mambakit.ops.inputs import TRITON_INTERVAL as INTERVAL
from mambakit.ops.inputs import ScanInputs
from mambakit.ops.triton.counting import power_of_two
from mambakit.ops.triton.launch import on_device_of, rows_contiguous
from mambakit.ops.triton.segments import tables
from mambakit.ops.triton.selective_scan_launches import (
    Plan,
    Walk,
    backward_launches,
    forward_launches,
    layout_of,
)
from mambakit.ops.triton.selective_scan_step import step

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`

_LANES = 32
_CHANNEL_SEGMENTS = 32768
_FEW_PROGRAMS = 2048
_MANY_CHANNELS = 8192  # enough for four lanes each to fill the chip
_SHORT = 1024  # steps that few channels take one after another in less time than three launches


@functools.lru_cache(maxsize=1024)
def plan(sequences: int, length: int, dim: int, state: int, keep: bool = False) -> Plan:
    """The configuration for a shape, from what was measured on an H200.

    Where lanes share states, B and C of two rounds are under way; of one where states are kept, whose places take
    registers: of at most 128 as many programs run at once as a batch of eight has.

    Segments are as long as leaves enough programs to fill the chip; longer sequences take longer segments, for
    carrying from one to the next is sequential. More than 16 states leave a thread room for one channel only, and so do
    `gradients` of a grid that would fill the chip hardly twice, for half as much to do in a program leaves less idle at
    its end, and of rows in which two channels can't be loaded as one.
    """
    steps = max(sequences * length, 1)
    filling = steps * max(dim, 1) // _CHANNEL_SEGMENTS  # steps a segment, for as many pairs of channel and segment
    size = min(max(power_of_two(filling + 1) // 2, 16), 128 if length <= 8192 else 256)
    if length <= 128 and sequences * dim >= 8192:
        size = 128  # one segment: no state is carried
    whole = length > size and state <= 16
    many = whole and sequences * dim >= _MANY_CHANNELS and state % 4 == 0
    short = whole and length <= _SHORT and state == 16
    block = 64 if state <= 16 else 32
    walk = Walk(block, 1, 4 if state <= 16 else 2 if state <= 32 else 1)
    programs = sequences * -(-length // size) * -(-dim // block)
    gradients = Walk(block, 1, 2 if state % 2 == 0 else 1)
    if programs < _FEW_PROGRAMS or dim % 16 != 0:
        gradients = Walk(_LANES, 1, gradients.unroll, 168)
    return Plan(
        size,
        states=walk._replace(unroll=8) if state <= 16 else walk,
        outputs=walk,
        split=4 if many else 16 if short else 0,
        depth=4 if short else 2,
        near=2 if many and not keep else 1,
        split_registers=128 if many and keep else None,
        backward_size=size,
        gradients_before=walk._replace(unroll=4),
        gradients=gradients,
    )


def forward(inputs: ScanInputs, y: Tensor, final_state: Tensor, kept: Tensor, chosen: Plan | None = None) -> None:
    """Fill y, the final state and, unless they are empty, the states before every INTERVAL-th step."""
    u, cu_seqlens = inputs.u, inputs.cu_seqlens
    _, length, dim = u.shape
    if dim == 0:
        return
    if length == 0:
        final_state.copy_(inputs.initial_state) if inputs.initial_state is not None else final_state.zero_()
        return
    with on_device_of(u):
        if length == 1 and cu_seqlens is None and kept.shape[0] == 0:
            step(inputs, y, final_state)
            return
        inputs = _readable(inputs)
        u, delta, A, B, C, D, z, delta_bias, initial_state, _, _ = inputs
        layout = layout_of(inputs, keep=kept.shape[0] > 0)
        launches = forward_launches(layout, chosen or plan(layout.sequences, length, dim, layout.state, layout.keep))
        table, firsts = tables(cu_seqlens, length, launches.size, launches.segments)
        if launches.split:
            pairs = A.new_empty(layout.batch, layout.groups, launches.rounds, launches.split, layout.state, 2)
            launches.arrange_rounds(B, C, pairs)
            launches.split_outputs(u, delta, A, pairs, D, z, delta_bias, initial_state, y, final_state, kept)
            return
        states = None
        if not launches.whole:
            states = A.new_empty(launches.segments, layout.state + 1, dim)
            launches.segment_states(u, delta, A, B, delta_bias, states, table)
            launches.carry_states(states, A, initial_state, final_state, firsts)
        launches.outputs(
            u, delta, A, B, C, D, z, delta_bias, states, initial_state, y, final_state, kept, table
        )  # fmt: skip


def one_step(inputs: ScanInputs, y: Tensor, final_state: Tensor) -> None:
    """`forward` of inputs without the axis of the length, which is one."""
    with on_device_of(inputs.u):
        step(inputs, y, final_state)


def backward(
    inputs: ScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    grads: ScanInputs,
    chosen: Plan | None = None,
) -> None:
    """Fill `grads`."""
    _, length, dim = inputs.u.shape
    if dim == 0 or length == 0:
        for grad in grads[:8]:
            if grad is not None:
                grad.zero_()
        if grads.initial_state is not None:
            grads.initial_state.zero_() if grad_final_state is None else grads.initial_state.copy_(grad_final_state)
        return
    with on_device_of(inputs.u):
        inputs, grad_y = _readable(inputs), rows_contiguous(grad_y)
        outer = None if grad_final_state is None else grad_final_state.contiguous()
        u, delta, A, B, C, D, z, delta_bias, *_ = inputs
        layout = layout_of(inputs, grad_y=grad_y, outer=outer is not None)
        groups, state = layout.groups, layout.state
        launches = backward_launches(layout, chosen or plan(layout.sequences, length, dim, state))
        table, firsts = tables(inputs.cu_seqlens, length, launches.size, launches.segments)
        carries = A.new_empty(launches.segments, state + 1, dim)
        rates, rows = A.new_empty(state, dim), A.new_empty(launches.slots, groups, state, INTERVAL, 2)
        sums = A.new_empty(launches.segments, state + 2, dim)  # of dA, dD and the gradient of the bias
        dBC = A.new_empty(launches.channel_blocks, launches.slots, state, 2 * INTERVAL)
        if not launches.whole:
            launches.segment_gradients(delta, A, C, z, delta_bias, grad_y, carries, table)
            launches.carry_gradients(carries, A, outer, grads.initial_state, firsts)
        launches.arrange(A, B, C, rates, rows, table)
        launches.gradients(
            u, delta, rates, D, z, delta_bias, rows, kept[0], grad_y, carries, outer,
            grads.u, grads.delta, grads.z, sums, dBC, grads.initial_state, table,
        )  # fmt: skip
        launches.sum_over_channels(dBC, grads.B, grads.C, table)
        launches.sum_over_segments(sums, grads.A, grads.D, grads.delta_bias)


def _readable(inputs: ScanInputs) -> ScanInputs:
    """The inputs as the kernels take them: contiguous, the activations at least along their channels."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    return ScanInputs(
        rows_contiguous(u),
        rows_contiguous(delta),
        A.contiguous(),
        B.contiguous(),
        C.contiguous(),
        None if D is None else D.contiguous(),
        None if z is None else rows_contiguous(z),
        None if delta_bias is None else delta_bias.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        cu_seqlens,
        delta_softplus,
    )
