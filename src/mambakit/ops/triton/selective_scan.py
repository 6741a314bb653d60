"""The selective scan on the GPU: how its kernels fit together.

Forward, parallel over segments of the length:

    segment_states    the state each segment ends in from a state of zero, and the sum of its dt
    carry             from segment to segment: h = exp(A sum dt) h + that state
    outputs           y of each segment from the state it starts in; for the backward, the state every INTERVAL steps

and where a sequence is one segment, `outputs` alone. Backward, the same in reverse for r, the gradient of the state:

    segment_gradients, carry    r at the end of each segment
    interleave                  B and C, small beside the rest, in float32 and in the order of the next
    gradients                   all gradients of a segment; dB and dC per block of channels
    sum_over_channels           dB and dC

The account, for E = batch length dim state and F = batch length dim. Exponentials: E in `outputs` and up to E in
`segment_states` (the last segment of a sequence needs none), E and up to E backward, where the states are formed once
more from those kept and both directions of a block share its decays; the floor is E forward and E backward. Reads and
writes of F elements: 2 and 4 forward, 3 and 9 backward, where the floor is 4 and 7; the states kept for the backward
are state / INTERVAL of float32 on top, dB and dC before their sum 2 state / 32. No sum over states crosses lanes; those
over channels take one exchange between lanes for two values (`_fold`). Loads are started one round of steps ahead.

INTERVAL is 8: blocks of 16 steps keep half as many states, but fill the registers, and ran 20% slower.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.ops.inputs import TRITON_INTERVAL as INTERVAL
from mambakit.ops.inputs import ScanInputs
from mambakit.ops.triton import selective_scan_backward as kernels_backward
from mambakit.ops.triton import selective_scan_forward as kernels_forward
from mambakit.ops.triton.segments import Segments, cut
from mambakit.ops.triton.selective_scan_step import step

_LANES = 32
_BLOCK_OF_CARRY = 128
_CHANNEL_SEGMENTS = 32768


class Launch(NamedTuple):
    """How a kernel that walks along a segment is launched."""

    block: int  # channels of a program
    warps: int
    unroll: int  # steps whose loads are under way together
    registers: int | None = None  # at most, of a thread


class Plan(NamedTuple):
    """The configuration of one call, by the class of its shape."""

    size: int  # steps of a segment, a multiple of INTERVAL
    states: Launch
    outputs: Launch
    backward_size: int
    gradients_before: Launch
    gradients: Launch


def plan(sequences: int, length: int, dim: int, state: int) -> Plan:
    """The configuration for a shape, from what was measured on an H200.

    Segments are as long as leaves enough programs to fill the chip; longer sequences take longer segments, for
    carrying from one to the next is sequential. More than 16 states leave a thread room for one channel only.
    """
    steps = max(sequences * length, 1)
    filling = steps * max(dim, 1) // _CHANNEL_SEGMENTS  # steps a segment, for as many pairs of channel and segment
    size = min(max(triton.next_power_of_2(filling + 1) // 2, 16), 128 if length <= 8192 else 256)
    if length <= 128 and sequences * dim >= 8192:
        size = 128  # one segment: no state is carried
    block, registers = (64, 128) if state <= 16 else (32, None)
    walk = Launch(block, 1, 2)
    return Plan(size, walk, walk, size, walk._replace(registers=registers), Launch(_LANES, 1, INTERVAL, registers))


def forward(inputs: ScanInputs, y: Tensor, final_state: Tensor, kept: Tensor, chosen: Plan | None = None) -> None:
    """Fill y, the final state and, unless they are empty, the states before every INTERVAL-th step."""
    u, cu_seqlens = inputs.u, inputs.cu_seqlens
    batch, length, dim = u.shape
    if dim == 0:
        return
    if length == 0:
        final_state.copy_(inputs.initial_state) if inputs.initial_state is not None else final_state.zero_()
        return
    with _device_of(u):
        if length == 1 and cu_seqlens is None and kept.shape[0] == 0:
            step(inputs, y, final_state)
            return
        call = _Call(inputs, chosen)
        segments = cut(batch, length, cu_seqlens, call.plan.size)
        whole = segments.each == 1
        states = call.states_before_segments(segments, final_state) if not whole else None
        call.outputs(segments, states, y, final_state, kept)


def backward(
    inputs: ScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor,
    grads: ScanInputs,
    chosen: Plan | None = None,
) -> None:
    """Fill `grads`."""
    batch, length, dim = inputs.u.shape
    if dim == 0 or length == 0:
        for grad in grads[:8]:
            if grad is not None:
                grad.zero_()
        if grads.initial_state is not None:
            grads.initial_state.copy_(grad_final_state)
        return
    with _device_of(inputs.u):
        call = _Call(inputs, chosen)
        segments = cut(batch, length, inputs.cu_seqlens, call.plan.backward_size)
        call.backward(segments, kept[0], _rows(grad_y), grad_final_state.contiguous(), grads)


class _Call:
    """The inputs of one call as its kernels take them."""

    def __init__(self, inputs: ScanInputs, chosen: Plan | None) -> None:
        self.batch, self.length, self.dim = inputs.u.shape
        self.groups, self.state = inputs.B.shape[2:]
        self.share = self.dim // self.groups
        self.u, self.delta = _rows(inputs.u), _rows(inputs.delta)
        self.z = None if inputs.z is None else _rows(inputs.z)
        self.A, self.B, self.C = inputs.A.contiguous(), inputs.B.contiguous(), inputs.C.contiguous()
        self.D = None if inputs.D is None else inputs.D.contiguous()
        self.bias = None if inputs.delta_bias is None else inputs.delta_bias.contiguous()
        self.initial = None if inputs.initial_state is None else inputs.initial_state.contiguous()
        self.softplus = inputs.delta_softplus
        sequences = self.batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        self.slots = slots(self.batch, self.length, sequences)
        self.plan = chosen or plan(sequences, self.length, self.dim, self.state)
        packs = 8 // self.B.element_size()
        aligned = self.B.data_ptr() % 8 == 0 and self.C.data_ptr() % 8 == 0
        self.packs = packs if self.state % packs == 0 and aligned else 1

    def states_before_segments(self, segments: Segments, final_state: Tensor) -> Tensor:
        """(segments, state, dim): the state that each segment starts in."""
        launch = self.plan.states
        states, sums = self.per_segment(segments, self.state), self.per_segment(segments)
        blocks = self.blocks(launch)
        kernels_forward.segment_states[segments.count * blocks,](
            self.u, self.delta, self.A, self.B, self.bias, states, sums, segments.table,
            self.length, self.dim, self.share, segments.size, segments.each, blocks, *_strides(self.u, self.delta),
            **self.constants(segments, launch), UNROLL=launch.unroll, PACKS=self.packs,
        )  # fmt: skip
        self.carry(segments, states, sums, self.initial, final_state, reverse=False)
        return states

    def carry(
        self,
        segments: Segments,
        states: Tensor,
        sums: Tensor,
        outer: Tensor | None,
        passed: Tensor | None,
        reverse: bool,
    ) -> None:
        blocks = triton.cdiv(self.state * self.dim, _BLOCK_OF_CARRY)
        kernels_forward.carry[segments.sequences * blocks,](
            states, sums, self.A, outer, passed, segments.firsts, segments.sequences, self.dim, segments.each, blocks,
            N=self.state, BLOCK=_BLOCK_OF_CARRY, UNROLL=8, REVERSE=reverse, OUTER=outer is not None,
            PASS=passed is not None and segments.table is not None, PACKED=segments.table is not None, num_warps=4,
        )  # fmt: skip

    def outputs(self, segments: Segments, states: Tensor | None, y: Tensor, final_state: Tensor, kept: Tensor) -> None:
        launch = self.plan.outputs
        blocks = self.blocks(launch)
        kernels_forward.outputs[segments.count * blocks,](
            self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias, states, self.initial,
            y, final_state, kept, segments.table,
            self.length, self.dim, self.share, segments.size, segments.each, blocks,
            *_strides(self.u, self.delta, self.z),
            **self.constants(segments, launch), UNROLL=launch.unroll, PACKS=self.packs, INTERVAL=INTERVAL,
            KEEP=kept.shape[0] > 0, WHOLE=states is None, INITIAL=self.initial is not None,
            SKIP=self.D is not None, GATE=self.z is not None,
        )  # fmt: skip

    def backward(
        self, segments: Segments, kept: Tensor, grad_y: Tensor, grad_final_state: Tensor, grads: ScanInputs
    ) -> None:
        whole = segments.each == 1
        if whole:
            carries = self.per_segment(segments, self.state)
        else:
            carries = self.gradients_after_segments(segments, grad_y, grad_final_state, grads)
        launch = self.plan.gradients
        blocks = self.blocks(launch)
        rows = self.u.new_empty(self.slots, self.groups, self.state, INTERVAL, 2, dtype=torch.float32)
        constants = {"N": self.state, "GROUPS": self.groups, "STEPS": INTERVAL, "PACKED": segments.table is not None}
        kernels_backward.interleave[segments.count * self.groups,](
            self.B, self.C, rows, segments.table, self.length, segments.size, segments.each,
            **constants, PADDED=triton.next_power_of_2(self.state), num_warps=1,
        )  # fmt: skip
        dA, dD, dbias = self.per_segment(segments, self.state), self.per_segment(segments), self.per_segment(segments)
        dBC = rows.new_empty(blocks, self.slots, self.state, 2 * INTERVAL)
        kernels_backward.gradients[segments.count * blocks,](
            self.u, self.delta, self.A, self.D, self.z, self.bias, rows, kept, grad_y, carries, grad_final_state,
            grads.u, grads.delta, grads.z, dA, dD, dbias, dBC, grads.initial_state, segments.table,
            self.length, self.dim, self.share, segments.size, segments.each, self.slots, blocks,
            *_strides(self.u, self.delta, self.z, grad_y),
            **self.constants(segments, launch), STEPS=INTERVAL, WHOLE=whole, INITIAL=self.initial is not None,
            SKIP=self.D is not None, GATE=self.z is not None,
        )  # fmt: skip
        pieces = segments.size // INTERVAL
        kernels_backward.sum_over_channels[segments.count * self.groups * pieces,](
            dBC, grads.B, grads.C, segments.table, self.length, segments.size, segments.each, self.slots, blocks,
            pieces, **constants, VALUES=triton.next_power_of_2(self.state * 2 * INTERVAL), TOGETHER=8, num_warps=4,
        )  # fmt: skip
        grads.A.copy_(dA.sum(0).t())
        if grads.D is not None:
            grads.D.copy_(dD.sum(0))
        if grads.delta_bias is not None:
            grads.delta_bias.copy_(dbias.sum(0))

    def gradients_after_segments(
        self, segments: Segments, grad_y: Tensor, grad_final_state: Tensor, grads: ScanInputs
    ) -> Tensor:
        """(segments, state, dim): the gradient of the state that each segment hands on."""
        launch = self.plan.gradients_before
        carries, sums = self.per_segment(segments, self.state), self.per_segment(segments)
        blocks = self.blocks(launch)
        kernels_backward.segment_gradients[segments.count * blocks,](
            self.delta, self.A, self.C, self.z, self.bias, grad_y, carries, sums, segments.table,
            self.length, self.dim, self.share, segments.size, segments.each, blocks,
            *_strides(self.delta, self.z, grad_y),
            **self.constants(segments, launch), UNROLL=launch.unroll, PACKS=self.packs, GATE=self.z is not None,
        )  # fmt: skip
        self.carry(segments, carries, sums, grad_final_state, grads.initial_state, reverse=True)
        return carries

    def blocks(self, launch: Launch) -> int:
        """Blocks of channels: none spans two groups."""
        return self.groups * triton.cdiv(self.share, launch.block)

    def per_segment(self, segments: Segments, *axes: int) -> Tensor:
        return self.A.new_empty(segments.count, *axes, self.dim)

    def constants(self, segments: Segments, launch: Launch) -> dict[str, Any]:
        return {
            "N": self.state, "GROUPS": self.groups, "BLOCK": launch.block, "SOFTPLUS": self.softplus,
            "BIAS": self.bias is not None, "PACKED": segments.table is not None,
            "num_warps": launch.warps, "maxnreg": launch.registers,
        }  # fmt: skip


def slots(batch: int, length: int, sequences: int) -> int:
    """How many states are kept: one for every INTERVAL steps of each sequence, counted without reading its bounds."""
    return batch * length // INTERVAL + sequences


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides over batch and length, one pair after another; nought for a tensor that is not there."""
    return [0 if tensor is None else tensor.stride(axis) for tensor in tensors for axis in (0, 1)]


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
