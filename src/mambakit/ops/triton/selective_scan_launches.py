"""The launches of the selective scan for one layout of its inputs: grids, numbers and constants, found out once.

A short scan takes the GPU a few microseconds and would take the host many more to count blocks and strides for. All
that follows from shapes, strides and what is there, a `Layout`, and is kept for the next call that has the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.ops.inputs import TRITON_INTERVAL as INTERVAL
from mambakit.ops.inputs import ScanInputs
from mambakit.ops.triton import selective_scan_backward as kernels_backward
from mambakit.ops.triton import selective_scan_forward as kernels_forward
from mambakit.ops.triton import selective_scan_split as kernels_split
from mambakit.ops.triton import selective_scan_sums as kernels_sums
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.segments import segment_counts
from mambakit.ops.triton.selective_scan_step import groups_and_state

_LANES = 32
_BLOCK_OF_CARRY = 128
_BLOCK_OF_SUM = 32
FETCHES = int(torch.version.hip is None and not triton.knobs.runtime.interpret)  # else nothing takes PTX


class Walk(NamedTuple):
    """How a kernel that walks along a segment is launched."""

    block: int  # channels of a program
    warps: int
    unroll: int  # steps whose activations are under way together; of `gradients`, states of a round, a divisor of all
    registers: int | None = None  # at most, of a thread


class Plan(NamedTuple):
    """The configuration of one call, by the class of its shape."""

    size: int  # steps of a segment, a multiple of INTERVAL
    states: Walk
    outputs: Walk
    split: int  # lanes that share the states of a channel where no sequence is cut up; 0: they are cut up
    depth: int  # rounds of so many steps whose activations are under way there
    near: int  # steps, or such rounds, whose B and C are under way
    split_registers: int | None  # at most, of a thread
    backward_size: int
    gradients_before: Walk
    gradients: Walk


class Layout(NamedTuple):
    """What the launches of a call follow from."""

    batch: int
    length: int
    dim: int
    groups: int
    state: int
    sequences: int
    packs: int  # numbers of B and C that a load takes
    packed: bool
    softplus: bool
    skip: bool
    gate: bool
    bias: bool
    initial: bool
    keep: bool  # forward: states are kept
    outer: bool  # backward: there is a gradient of the final state
    strides: tuple[int, ...]  # over batch and length of u, delta, z and the gradient of y, nought for what is not there


def layout_of(inputs: ScanInputs, keep: bool = False, grad_y: Tensor | None = None, outer: bool = False) -> Layout:
    """The layout of inputs with contiguous rows."""
    u, delta, _, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    groups, state = groups_and_state(u, B)
    batch, length, dim = u.shape
    packs = 8 // B.element_size()
    aligned = (B.data_ptr() | C.data_ptr()) % 8 == 0
    return Layout(
        batch, length, dim, groups, state,
        sequences=batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        packs=packs if aligned and state % packs == 0 else 1,
        packed=cu_seqlens is not None,
        softplus=delta_softplus,
        skip=D is not None,
        gate=z is not None,
        bias=delta_bias is not None,
        initial=initial_state is not None,
        keep=keep,
        outer=outer,
        strides=(
            *u.stride()[:2], *delta.stride()[:2],
            *((0, 0) if z is None else z.stride()[:2]), *((0, 0) if grad_y is None else grad_y.stride()[:2]),
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def forward_launches(layout: Layout, plan: Plan) -> "ForwardLaunches":
    """Of the layout, kept for the next call."""
    return ForwardLaunches(layout, plan)


@functools.lru_cache(maxsize=512)
def backward_launches(layout: Layout, plan: Plan) -> "BackwardLaunches":
    """Of the layout, kept for the next call."""
    return BackwardLaunches(layout, plan)


class _Launches:
    """What both directions share: how the length and the channels are cut up."""

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout = layout
        self.size = size
        self.share = layout.dim // layout.groups
        self.segments, self.each = segment_counts(
            layout.batch, layout.length, layout.sequences, size, packed=layout.packed
        )
        self.aligned = all(stride % 16 == 0 for stride in layout.strides[::2])  # over the batch
        self.whole = self.each == 1  # a sequence is one segment: nothing is carried

    def blocks(self, walk: Walk) -> int:
        """Blocks of channels: none spans two groups."""
        return self.layout.groups * ceil_div(self.share, walk.block)

    def numbers(self) -> tuple[int, ...]:
        return (self.layout.length, self.layout.dim, self.share, self.size, self.each)

    def constants(self, walk: Walk) -> dict[str, Any]:
        layout = self.layout
        return {
            "N": layout.state, "GROUPS": layout.groups, "BLOCK": walk.block,
            "FULL": self.aligned and self.share % walk.block == 0, "SOFTPLUS": layout.softplus, "BIAS": layout.bias,
            "PACKED": layout.packed, "num_warps": walk.warps, "maxnreg": walk.registers,
        }  # fmt: skip

    def carry(self, outer: bool, passed: bool, reverse: bool) -> Callable[..., None]:
        layout = self.layout
        blocks = ceil_div(layout.state * layout.dim, _BLOCK_OF_CARRY)
        return kernels_forward.carry.bind(
            (layout.sequences * blocks,), layout.sequences, layout.dim, self.each, blocks,
            N=layout.state, BLOCK=_BLOCK_OF_CARRY, UNROLL=8, REVERSE=reverse, OUTER=outer,
            PASS=passed and layout.packed, PACKED=layout.packed, num_warps=4,
        )  # fmt: skip


class ForwardLaunches(_Launches):
    """Each launch is a function of the tensors of its kernel."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        super().__init__(layout, plan.size)
        u, delta, z = layout.strides[:2], layout.strides[2:4], layout.strides[4:6]
        walk = plan.states
        blocks = self.blocks(walk)
        ahead = {"AHEAD": walk.unroll, "NEAR": plan.near, "ROWS": self.rows(walk.block)}
        self.segment_states = kernels_forward.segment_states.bind(
            (self.segments * blocks,), *self.numbers(), blocks, *u, *delta,
            **self.constants(walk), **ahead, PACKS=layout.packs,
        )  # fmt: skip
        self.carry_states = self.carry(layout.initial, passed=True, reverse=False)
        self.split = 0 if layout.packed else plan.split
        if self.split:
            self.rounds = ceil_div(layout.length, plan.split)
            self.arrange_rounds = kernels_split.arrange_rounds.bind(
                (layout.batch * layout.groups * self.rounds,), layout.length, self.rounds,
                N=layout.state, PADDED=power_of_two(layout.state), GROUPS=layout.groups, SPLIT=plan.split, num_warps=1,
            )  # fmt: skip
            self.split_outputs = self.all_at_once(plan)
        walk = plan.outputs
        blocks = self.blocks(walk)
        ahead = {"AHEAD": walk.unroll, "NEAR": plan.near, "ROWS": self.rows(walk.block)}
        self.outputs = kernels_forward.outputs.bind(
            (self.segments * blocks,), *self.numbers(), blocks, *u, *delta, *z,
            **self.constants(walk), **ahead, PACKS=layout.packs, INTERVAL=INTERVAL, KEEP=layout.keep,
            WHOLE=self.whole, INITIAL=layout.initial, SKIP=layout.skip, GATE=layout.gate,
        )  # fmt: skip

    def rows(self, block: int) -> tuple[int, ...] | None:
        """From a step to the next of u, delta, z and y, for the compiler to know where channels come in whole blocks:
        loads then reach a row from another without arithmetic."""
        whole = self.aligned and self.share % block == 0
        return (*self.layout.strides[1:6:2], self.layout.dim) if whole else None

    def all_at_once(self, plan: Plan) -> Callable[..., None]:
        layout, split = self.layout, plan.split
        blocks = layout.groups * ceil_div(self.share, _LANES // split)
        return kernels_split.split_outputs.bind(
            (layout.batch * blocks,), layout.length, layout.dim, self.share, self.rounds, blocks, *layout.strides[:6],
            N=layout.state, GROUPS=layout.groups, SPLIT=split, ROWS=self.rows(_LANES // split),
            DEPTH=plan.depth, NEAR=plan.near, FULL=self.aligned, INTERVAL=INTERVAL, KEEP=layout.keep,
            INITIAL=layout.initial, SOFTPLUS=layout.softplus, BIAS=layout.bias, SKIP=layout.skip, GATE=layout.gate,
            num_warps=1, maxnreg=plan.split_registers,
        )  # fmt: skip


class BackwardLaunches(_Launches):
    """Each launch is a function of the tensors of its kernel."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        super().__init__(layout, plan.backward_size)
        delta_z_grad = layout.strides[2:]
        self.slots = slots(layout.batch, layout.length, layout.sequences)
        walk = plan.gradients_before
        blocks = self.blocks(walk)
        self.segment_gradients = kernels_backward.segment_gradients.bind(
            (self.segments * blocks,), *self.numbers(), blocks, *delta_z_grad,
            **self.constants(walk), UNROLL=walk.unroll, PACKS=layout.packs, GATE=layout.gate,
        )  # fmt: skip
        self.carry_gradients = self.carry(layout.outer, passed=layout.initial, reverse=True)
        shared = {"N": layout.state, "GROUPS": layout.groups, "STEPS": INTERVAL, "PACKED": layout.packed}
        pieces = self.size // INTERVAL
        self.arrange = kernels_backward.arrange.bind(
            (self.segments * pieces * layout.groups + ceil_div(layout.dim, _BLOCK_OF_SUM),),
            self.segments, pieces, layout.dim, layout.length, self.size, self.each,
            **shared, PADDED=power_of_two(layout.state), BLOCK=_BLOCK_OF_SUM, num_warps=1,
        )  # fmt: skip
        walk = plan.gradients
        self.channel_blocks = self.blocks(walk)
        constants = self.constants(walk)
        self.gradients = kernels_backward.gradients.bind(
            (self.segments * self.channel_blocks,), *self.numbers(), self.slots, self.channel_blocks,
            *layout.strides,
            **constants, STEPS=INTERVAL, EVEN=layout.length % INTERVAL == 0 and not layout.packed,
            TOGETHER=walk.unroll, FETCH=FETCHES if constants["FULL"] else 0, WHOLE=self.whole, OUTER=layout.outer,
            INITIAL=layout.initial, SKIP=layout.skip, GATE=layout.gate,
        )  # fmt: skip
        self.sum_over_channels = kernels_sums.sum_over_channels.bind(
            (self.segments * layout.groups * pieces,), layout.length, self.size, self.each, self.slots,
            self.channel_blocks, pieces,
            **shared, VALUES=power_of_two(layout.state * 2 * INTERVAL), TOGETHER=8, num_warps=4,
        )  # fmt: skip
        self.sum_over_segments = kernels_sums.sum_over_segments.bind(
            (ceil_div(layout.dim, _BLOCK_OF_SUM), layout.state + 2), self.segments, layout.dim,
            N=layout.state, BLOCK=_BLOCK_OF_SUM, TOGETHER=32, num_warps=4,
        )  # fmt: skip


def slots(batch: int, length: int, sequences: int) -> int:
    """How many states are kept: one for every INTERVAL steps of each sequence, counted without reading its bounds."""
    return batch * length // INTERVAL + sequences
