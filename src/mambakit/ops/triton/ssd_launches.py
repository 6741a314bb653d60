"""The launches of the scan of Mamba-2 for one shape of its inputs: grids, numbers and constants, found out once.

Between kernels that take the GPU some microseconds the host must not count blocks and strides anew. All that follows
from shapes, strides and what is there, a `Shape` and its cut, and is kept for the next call that has the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.inputs import SsdInputs
from mambakit.ops.triton import interpreting
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import LARGEST, float32_products, processors_of
from mambakit.ops.triton.ssd_backward import key_gradients, pair_gradients, sum_splits, value_gradients
from mambakit.ops.triton.ssd_forward import walk_outputs, walk_states
from mambakit.ops.triton.ssd_layout import NO_TABLES, Layout, Tables, cut, cut_pack
from mambakit.ops.triton.ssd_limits import chunk_of
from mambakit.ops.triton.ssd_single import single_outputs
from mambakit.ops.triton.ssd_steps import finish_steps, prepare_steps, sum_chunks

_STEPS_HEADS = 16  # heads to a program of the kernels of ssd_steps
_SUMMED = 1024, 32  # chunks to a loop of sum_chunks times numbers to a program, and the most of these
_BLOCK_OF_SUM = 1024
_PIECE = 16  # rows of a state that a product of float32 takes at once


class Configuration(NamedTuple):
    """Block sizes, warps and stages of software pipelining, by shape class."""

    block_outputs: int  # of the headdim
    warps_outputs: int
    stages_outputs: int
    block_single: int
    warps_single: int
    block_states: int
    warps_states: int
    stages_states: int
    block_values: int
    warps_values: int
    stages_values: int
    block_pairs: int
    warps_pairs: int
    stages_pairs: int
    block_keys: int
    warps_keys: int
    stages_keys: int
    programs_wanted: int  # to fill the chip
    programs_of_heads: int  # the same where a program has no more to leave for having more heads


def configuration(
    headdim: int, state: int, dtype: torch.dtype, gate: bool, chunk: int, processors: int
) -> Configuration:
    """The shape class is the dtype, the sizes of a state and a chunk, and whether there is a gate.

    Tiles of half precision that are 32 wide are a seventh faster, and right where they were measured; elsewhere Triton
    3.6 on Hopper has made wrong numbers of some.
    """
    wide, large = dtype == torch.float32, state > 128
    whole = power_of_two(headdim, 16)
    block = min(whole, 64)
    narrow = min(whole, 16 if large else 32) if wide else block
    measured = not wide and not gate and chunk == 64 and power_of_two(state, 16) == 128
    return Configuration(
        block_outputs=min(block, 32) if wide and large else block,
        warps_outputs=8 if wide or large else 4,
        stages_outputs=1,
        block_single=min(block, 32) if wide and large else block,
        warps_single=8 if large else 4,
        block_states=narrow,
        warps_states=8 if wide or large else 4,
        stages_states=1 if wide or large else 4,
        block_values=min(block, 32) if measured else block,
        warps_values=8 if wide or large or gate else 4,
        stages_values=1 if wide or large else 2,
        block_pairs=block,
        warps_pairs=8 if wide else 4,
        stages_pairs=1 if wide else 3 if measured else 2,
        block_keys=narrow,
        warps_keys=8 if wide or large else 4,
        stages_keys=1 if wide or large else 3,
        programs_wanted=2 * processors,
        programs_of_heads=8 * processors,
    )


class Shape(NamedTuple):
    """What the launches of a call follow from, beside the cut of its sequences."""

    batch: int
    length: int
    heads: int
    headdim: int
    groups: int
    state: int
    dtype: torch.dtype
    packed: bool
    softplus: bool
    limits: tuple[float, float]
    gate: bool
    skip: bool
    bias: bool
    x_strides: tuple[int, ...]  # this and the next three over batch, length, and heads or groups
    B_strides: tuple[int, ...]
    C_strides: tuple[int, ...]
    z_strides: tuple[int, ...]
    dt_strides: tuple[int, ...]
    D_strides: tuple[int, ...]
    precision: str  # of products
    processors: int


def shape_of(inputs: SsdInputs) -> Shape:
    """The shape of inputs with contiguous rows."""
    x, dt, _, B, C, D, z, dt_bias, _, cu_seqlens, softplus, dt_min, dt_max, _ = inputs
    batch, length, heads, headdim = x.shape
    _, _, groups, state = B.shape
    return Shape(
        batch, length, heads, headdim, groups, state, x.dtype,
        packed=cu_seqlens is not None,
        softplus=softplus,
        limits=(dt_min, dt_max),
        gate=z is not None,
        skip=D is not None,
        bias=dt_bias is not None,
        x_strides=x.stride()[:3],
        B_strides=B.stride()[:3],
        C_strides=C.stride()[:3],
        z_strides=(0, 0, 0) if z is None else z.stride()[:3],
        dt_strides=dt.stride(),
        D_strides=(0, 0) if D is None else D.stride(),
        precision=float32_products() if x.dtype == torch.float32 else "widened" if interpreting() else "ieee",
        processors=processors_of(x.device),
    )  # fmt: skip


def launches_of(inputs: SsdInputs) -> tuple["Launches", Tables]:
    """Of inputs with contiguous rows; kept for the next call, but for the tables of packed sequences."""
    shape = shape_of(inputs)
    chunk = chunk_of(inputs.chunk_size, shape.length, shape.dtype)
    if inputs.cu_seqlens is None:
        return _launches(shape, chunk), NO_TABLES
    layout, tables = cut_pack(shape.length, inputs.cu_seqlens, chunk, *_programs(shape, chunk))
    return _launches_of_pack(shape, layout), tables


@functools.lru_cache(maxsize=512)
def _launches(shape: Shape, chunk: int) -> "Launches":
    return Launches(shape, cut(shape.batch, shape.length, chunk, *_programs(shape, chunk)))


@functools.lru_cache(maxsize=512)
def _launches_of_pack(shape: Shape, layout: Layout) -> "Launches":
    return Launches(shape, layout)


def _configuration(shape: Shape, chunk: int) -> Configuration:
    return configuration(shape.headdim, shape.state, shape.dtype, shape.gate, chunk, shape.processors)


@functools.lru_cache(maxsize=512)
def _programs(shape: Shape, chunk: int) -> tuple[int, int]:
    """How many programs a segment takes, and how many fill the chip."""
    config = _configuration(shape, chunk)
    return shape.heads * ceil_div(shape.headdim, config.block_outputs), config.programs_wanted


class Launches:
    """Each launch is a function of the tensors of its kernel, bound when it is first asked for."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        self.shape, self.layout = shape, layout
        self.config = _configuration(shape, layout.chunk)
        self.fine = shape.dtype == torch.float32
        self.single = not shape.packed and layout.chunks_of_sequence == 1
        self.block_state = power_of_two(shape.state, 16)
        self.piece = min(_PIECE, self.block_state) if self.fine else self.block_state
        self.in_pieces = self.piece < self.block_state  # states then pass through memory, also where none is kept
        strides = (*shape.x_strides, *shape.B_strides, *shape.C_strides, *shape.z_strides)
        self.aligned = all(stride % 16 == 0 for stride in strides)
        per_head = (*shape.x_strides[2:], *shape.B_strides[2:], *shape.C_strides[2:], *shape.z_strides[2:])
        self.far_apart = max(per_head) * shape.heads > LARGEST  # for kernels that count heads in 32 bits
        self.dy_strides = (shape.length * shape.heads * shape.headdim, shape.heads * shape.headdim, shape.headdim)
        self.share = shape.heads // shape.groups
        programs = max(1, layout.chunks * shape.groups)
        self.splits, self.heads_of_program = _split(self.share, programs, self.config.programs_wanted)
        self.pair_splits, self.heads_of_pairs = _split(self.share, programs, self.config.programs_of_heads)
        self.bind = functools.cache(self._bind)

    def _bind(self, name: str, **case: bool) -> Callable[..., None]:
        found: Callable[..., None] = getattr(self, f"_{name}")(**case)
        return found

    def _numbers(self) -> tuple[int, ...]:
        shape, layout = self.shape, self.layout
        return (
            shape.length, layout.chunks_of_sequence, layout.chunks, shape.heads, shape.headdim, shape.state, self.share,
        )  # fmt: skip

    def _walk_numbers(self, blocks: int) -> tuple[int, ...]:
        shape, layout = self.shape, self.layout
        return (
            shape.length, layout.chunks_of_sequence, layout.segments_of_sequence, layout.chunks_of_segment,
            layout.chunks, shape.heads, shape.headdim, shape.state, self.share, blocks,
        )  # fmt: skip

    def _constants(self, block: int) -> dict[str, Any]:
        return {
            "CHUNK": self.layout.chunk, "BLOCK_P": block, "BLOCK_N": self.block_state, "FINE": self.fine,
            "ALIGN": 16 if self.aligned else 1, "PRECISION": self.shape.precision,
        }  # fmt: skip

    def _over_steps(self, kernel: Any) -> Callable[..., None]:
        shape, layout = self.shape, self.layout
        return kernel.bind(
            (layout.chunks, ceil_div(shape.heads, _STEPS_HEADS)), *shape.dt_strides, shape.length,
            layout.chunks_of_sequence, layout.chunks, shape.heads,
            CHUNK=layout.chunk, HEADS=_STEPS_HEADS, FINE=self.fine, SOFTPLUS=shape.softplus, HAS_BIAS=shape.bias,
            PACKED=shape.packed, DT_MIN=shape.limits[0], DT_MAX=shape.limits[1], num_warps=4,
        )  # fmt: skip

    def _prepare(self) -> Callable[..., None]:
        return self._over_steps(prepare_steps)

    def _finish(self) -> Callable[..., None]:
        return self._over_steps(finish_steps)

    def _outputs(self, initial: bool, keep: bool) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        blocks = ceil_div(shape.headdim, config.block_outputs)
        return walk_outputs.bind(
            (shape.heads * blocks * layout.segments,), *shape.x_strides, *shape.B_strides, *shape.C_strides,
            *shape.z_strides, *shape.D_strides, *self._walk_numbers(blocks),
            **self._constants(config.block_outputs), PACKED=shape.packed, PIECE=self.piece, HAS_Z=shape.gate,
            HAS_D=shape.skip, HAS_INITIAL=initial, WRITE_FINAL=not layout.segmented, KEEP=keep,
            STAGES=config.stages_outputs, num_warps=config.warps_outputs,
        )  # fmt: skip

    def _single_outputs(self) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        block = config.block_single
        return single_outputs.bind(
            (shape.heads * shape.batch,), *shape.x_strides, *shape.B_strides, *shape.C_strides, *shape.z_strides,
            *shape.D_strides, shape.length, layout.chunks, shape.heads, shape.headdim, shape.state, self.share,
            **self._constants(block), BLOCKS=ceil_div(shape.headdim, block), PIECE=min(self.block_state, 2 * _PIECE),
            HAS_Z=shape.gate, HAS_D=shape.skip, num_warps=config.warps_single,
        )  # fmt: skip

    def _states(self, reverse: bool, initial: bool, final: bool, factors: bool, keep: bool) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        blocks = ceil_div(shape.headdim, config.block_states)
        strides = (*self.dy_strides, *shape.C_strides) if reverse else (*shape.x_strides, *shape.B_strides)
        constants = self._constants(config.block_states)
        if self.dy_strides[1] % 16:
            constants["ALIGN"] = 1
        return walk_states.bind(
            (shape.heads * blocks * layout.segments,), *strides, *shape.z_strides, *self._walk_numbers(blocks),
            **constants, PACKED=shape.packed, REVERSE=reverse, HAS_Z=reverse and shape.gate, HAS_INITIAL=initial,
            WRITE_FINAL=final, WRITE_FACTOR=factors, KEEP=keep, STAGES=config.stages_states,
            num_warps=config.warps_states,
        )  # fmt: skip

    def _values(self, states: bool, state_grads: bool) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        return value_gradients.bind(
            (shape.groups * self.pair_splits * layout.chunks,), *shape.x_strides, *shape.B_strides, *shape.C_strides,
            *shape.z_strides, *shape.D_strides, *self._numbers(), self.pair_splits, self.heads_of_pairs,
            **self._constants(config.block_values), BLOCKS=ceil_div(shape.headdim, config.block_values),
            PACKED=shape.packed, PIECE=self.piece, HAS_Z=shape.gate, HAS_D=shape.skip, HAS_STATES=states,
            HAS_STATE_GRADS=state_grads, STAGES=config.stages_values, num_warps=config.warps_values,
        )  # fmt: skip

    def _pairs(self) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        return pair_gradients.bind(
            (shape.groups * self.pair_splits * layout.chunks,), *shape.x_strides, *shape.B_strides, *shape.C_strides,
            *shape.z_strides, *self._numbers(), self.pair_splits, self.heads_of_pairs,
            **self._constants(config.block_pairs), BLOCKS=ceil_div(shape.headdim, config.block_pairs),
            PACKED=shape.packed, PIECE=self.piece, HAS_Z=shape.gate, HAS_D=shape.skip, STAGES=config.stages_pairs,
            num_warps=config.warps_pairs,
        )  # fmt: skip

    def _keys(self, source: bool, states: bool) -> Callable[..., None]:
        shape, layout, config = self.shape, self.layout, self.config
        strides = (*shape.x_strides, *shape.C_strides) if source else (*self.dy_strides, *shape.B_strides)
        constants = self._constants(config.block_keys)
        if self.dy_strides[1] % 16:
            constants["ALIGN"] = 1
        return key_gradients.bind(
            (shape.groups * self.splits * layout.chunks,), *strides, *shape.z_strides, *self._numbers(), self.splits,
            self.heads_of_program, shape.batch * shape.length, self.pair_splits,
            **constants, BLOCKS=ceil_div(shape.headdim, config.block_keys), PACKED=shape.packed, SOURCE=source,
            HAS_Z=shape.gate and not source, HAS_STATES=states, STAGES=config.stages_keys, num_warps=config.warps_keys,
        )  # fmt: skip

    def _sum_splits(self) -> Callable[..., None]:
        shape = self.shape
        values = shape.batch * shape.length * shape.groups * shape.state
        return sum_splits.bind(
            (ceil_div(values, _BLOCK_OF_SUM),), self.splits, values, BLOCK=_BLOCK_OF_SUM, num_warps=4
        )

    def _sum_chunks(self) -> Callable[..., None]:
        shape = self.shape
        tile, most = _SUMMED
        columns = most if shape.heads * shape.headdim >= 32 * most else 8
        programs = ceil_div(shape.heads, columns) * (1 + shape.bias)
        programs += ceil_div(shape.heads * shape.headdim, columns) * shape.skip
        return sum_chunks.bind(
            (programs,), self.layout.chunks, shape.heads, shape.headdim,
            HAS_BIAS=shape.bias, HAS_D=shape.skip, ROWS=tile // columns, COLUMNS=columns, num_warps=4,
        )  # fmt: skip


def _split(heads: int, programs: int, wanted: int) -> tuple[int, int]:
    """Into how many parts to split the heads of a group so that `wanted` programs run, and the heads of a part."""
    of_program = -(-heads // min(heads, -(-wanted // programs)))
    return -(-heads // of_program), of_program


def given_or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's argument can't be absent: where it is not read, `stand_in` is given."""
    return stand_in if tensor is None else tensor
