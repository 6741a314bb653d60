"""The launches of the Mamba-3 scan for one layout of its inputs: grids, numbers and constants, found out once.

All that follows from shapes, strides and what is there, a `Layout`, and is kept for the next call that has the same, so
that the host does no more for a launch than hand over its tensors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mambakit.ops.triton import (
    interpreting,
    mamba3_angles,
    mamba3_chunk,
    mamba3_key_gradients,
    mamba3_keys,
    mamba3_outputs,
    mamba3_shapes,
    mamba3_value_gradients,
    mamba3_walk,
)
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import Kernel
from mambakit.ops.triton.mamba3_shapes import Sizes

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_PROGRAMS = 256  # about what fills the chip: below it a sequence is walked in several segments
_LEAST_CHUNKS = 4  # of a segment
_HEADS = 8  # to a program of `prepare`
_HEADS_AT_ONCE = 4  # whose loads are under way together in `finish_turns`
_PAIRS = 32  # to a program of `vector_gradients`, where a chunk has 64 rows
_PAIRS_OF_KEYS = 32  # to a program of `keys_and_queries`
_CHUNKS = 32  # whose angles are summed together

CONFIGURATION: dict[str, dict[str, int]] = {
    "walk": {"BLOCK": 64, "num_warps": 4, "STAGES": 3},
    "walk_outputs": {"BLOCK": 64, "num_warps": 4, "STAGES": 1},
    "value_gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "key_gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "keys_and_queries": {"num_warps": 4},
    "vector_gradients": {"num_warps": 4, "STAGES": 3},
}
WARPS_OF_FLOAT32 = {"walk_outputs": 8, "value_gradients": 8, "key_gradients": 8}  # which needs twice the registers

Launch = Callable[..., None]


class Layout(NamedTuple):
    """What decides about the launches of a scan."""

    size: Sizes
    dtype: torch.dtype  # of x, B, C and z
    products: str  # of float32: an input_precision of tl.dot
    speed_heads: int
    interleaved: bool
    ranked: bool  # y has an axis of ranks
    fresh: bool  # there is no initial state
    row_strides: tuple[int, int, int, int]  # of x, B, C and z
    D_strides: tuple[int, int]  # one number for all channels of a head is not spread


@functools.lru_cache(maxsize=256)
def launches(layout: Layout) -> "Launches":
    """Of the layout, kept for the next call."""
    return Launches(layout)


class Launches:
    """Each launch is a function of the tensors of its kernel."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        size = self.size = layout.size
        self.ranks = power_of_two(size.rank)
        self.rows = size.steps * self.ranks
        self.wide = layout.dtype == torch.float32
        self.cut: dict[str, Any] = {"STEPS": size.steps, "RANKS": self.ranks, "HALF": size.half}
        self.vectors = {**self.cut, "INTERLEAVED": layout.interleaved, "FAST": not interpreting()}
        self.turns = {"STEPS": size.steps, "PAIRS": power_of_two(size.pairs)}
        self.runs_field = size.slots * size.heads * size.steps
        self.columns = min(_PAIRS * max(1, 64 // self.rows), size.half)
        self.pair_blocks = ceil_div(size.pairs, self.columns)
        whole = layout.speed_heads > 1 or size.groups == 1
        self.turns_at_once = size.single and self.pair_blocks == 1 and whole  # one program knows of a chunk's angles
        self.x, self.B, self.C, self.z = layout.row_strides
        self.y = size.heads * size.headdim * (size.rank if layout.ranked else 1)
        self.programs, self.segments, self.segment_chunks = self._cut_walk()
        self.value_gradients = functools.cache(self._value_gradients)  # with states, or without any
        self.key_gradients = functools.cache(self._key_gradients)

    @property
    def tiles(self) -> dict[str, Any]:
        """How products are formed; those of float32 of a state above 128 leave no room for TF32's tiles."""
        # The interpreter has no products in bfloat16.
        precision = "ieee" if interpreting() else _PRECISION.get(self.layout.dtype, self.layout.products)
        if precision == "tf32" and self.size.half > 64:
            precision = "tf32x3"
        return {**self.cut, "FINE": self.wide, "PRECISION": precision}

    def block(self, kernel: str, rows_of_few: int = 0) -> dict[str, int]:
        """How a kernel is cut and launched; with at most `rows_of_few` rows float32 needs no more warps."""
        chosen = dict(CONFIGURATION[kernel])
        if "STAGES" in chosen and (self.wide or self.size.state > 128):
            chosen["STAGES"] = 1  # more would not fit the chip's memory
        if self.wide and self.rows > rows_of_few:
            chosen["num_warps"] = WARPS_OF_FLOAT32.get(kernel, chosen["num_warps"])
        chosen["BLOCK"] = min(chosen["BLOCK"], power_of_two(self.size.headdim, mamba3_shapes.least_tile()))
        return chosen

    def _cut_walk(self) -> tuple[int, int, int]:
        """Programs along a segment, segments of a sequence, and chunks of a segment."""
        size = self.size
        programs = size.sequences * size.heads * ceil_div(size.headdim, self.block("walk")["BLOCK"])
        chunks = ceil_div(size.length, size.steps)
        segments = max(1, min(_PROGRAMS // programs, chunks // _LEAST_CHUNKS)) if programs else 1
        return programs, segments, max(1, ceil_div(chunks, segments))

    @functools.cached_property
    def prepare(self) -> Launch:
        size, heads = self.size, min(_HEADS, power_of_two(self.size.heads))
        return mamba3_chunk.prepare.bind(
            (size.slots, ceil_div(size.heads, heads)), size.length, size.heads, self.layout.speed_heads, size.pairs,
            **self.turns, HEADS=heads, FINE=self.wide,
        )  # fmt: skip

    @functools.cached_property
    def carry_turns(self) -> Launch:
        size = self.size
        return mamba3_keys.carry_turns.bind(
            (size.sequences * size.heads,), size.length, size.heads, size.pairs, CHUNKS=_CHUNKS, **self.turns
        )

    @functools.cached_property
    def keys_and_queries(self) -> Launch:
        size, columns = self.size, min(_PAIRS_OF_KEYS, self.size.half)
        warps = CONFIGURATION["keys_and_queries"] if self.rows > 32 else {"num_warps": 2}
        return mamba3_keys.keys_and_queries.bind(
            (size.slots * size.heads, ceil_div(size.half, columns)), size.length, size.heads, size.groups, size.rank,
            size.state, self.layout.speed_heads, size.pairs, self.B, self.C,
            COLUMNS=columns, **self.vectors, **warps,
        )  # fmt: skip

    @functools.cached_property
    def walk_outputs(self) -> Launch:
        size = self.size
        few = 32 if size.single and self.layout.fresh else 0
        return mamba3_outputs.walk_outputs.bind(
            (self.programs, self.segments), self.runs_field, size.length, self.segment_chunks, size.heads,
            size.headdim, size.rank, size.state, self.x, self.z, *self.layout.D_strides,
            INTERLEAVED=self.layout.interleaved, SINGLE=size.single, **self.tiles, **self.block("walk_outputs", few),
        )  # fmt: skip

    @functools.cached_property
    def walk_forward(self) -> Launch:
        return self._walk(self.x, 0, reverse=False)

    @functools.cached_property
    def walk_back(self) -> Launch:
        return self._walk(self.y, self.z, reverse=True)

    def _walk(self, x: int, z: int, reverse: bool) -> Launch:
        size = self.size
        return mamba3_walk.walk.bind(
            (self.programs, self.segments), self.runs_field, size.length, self.segment_chunks, size.heads,
            size.headdim, size.rank, size.state, x, z,
            REVERSE=reverse, RANKED=reverse and self.layout.ranked, INTERLEAVED=self.layout.interleaved,
            **self.tiles, **self.block("walk"),
        )  # fmt: skip

    def _value_gradients(self, stateless: bool) -> Launch:
        numbers = (self.size.rank, self.x, self.z, self.y, *self.layout.D_strides)
        return self._of_chunks("value_gradients", mamba3_value_gradients.value_gradients, stateless, numbers)

    def _key_gradients(self, stateless: bool) -> Launch:
        numbers = (self.size.rank, self.size.pairs, self.x, self.z, self.y)
        return self._of_chunks("key_gradients", mamba3_key_gradients.key_gradients, stateless, numbers)

    def _of_chunks(self, name: str, kernel: Kernel, stateless: bool, numbers: tuple[int, ...]) -> Launch:
        """Without states a chunk may have few rows, for which float32 needs no more warps."""
        size, block = self.size, self.block(name, rows_of_few=16 if stateless else 0)
        return kernel.bind(
            (size.slots * size.heads,), self.runs_field, size.length, size.heads, size.headdim, *numbers,
            CHANNEL_BLOCKS=ceil_div(size.headdim, block["BLOCK"]), RANKED=self.layout.ranked, **self.tiles, **block,
        )  # fmt: skip

    @functools.cached_property
    def vector_gradients(self) -> Launch:
        size = self.size
        return mamba3_keys.vector_gradients.bind(
            (size.slots * size.groups, ceil_div(size.half, self.columns)), size.length, size.rows, size.heads,
            size.groups, size.rank, size.state, self.layout.speed_heads, size.pairs,
            COLUMNS=self.columns, SHARED=self.layout.speed_heads == 1, **self.vectors,
            **CONFIGURATION["vector_gradients"],
        )  # fmt: skip

    @functools.cached_property
    def later_sums(self) -> Launch:
        size = self.size
        return mamba3_angles.later_sums.bind(
            (size.sequences * size.heads,), size.length, size.heads, size.pairs, CHUNKS=_CHUNKS, **self.turns
        )

    @functools.cached_property
    def finish_turns(self) -> Launch:
        size = self.size
        return mamba3_angles.finish_turns.bind(
            (size.slots,), size.length, size.rows, size.heads, size.groups, self.layout.speed_heads, size.pairs,
            BLOCKS=self.pair_blocks, HEADS=min(_HEADS_AT_ONCE, power_of_two(size.heads)),
            SHARED=self.layout.speed_heads == 1, num_warps=8 if size.steps > 32 else 4, **self.turns,
        )  # fmt: skip
