"""How the kernels of the Mamba-3 scan cut their inputs, known without loading Triton."""

from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.ops import triton
from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.packing import sequence_count
from mambakit.ops.triton.counting import ceil_div, power_of_two

_LEAST_ROWS, _MOST_ROWS = 16, 64  # of a chunk: what a product needs at least, what the registers hold
_GPU_TILE = 64  # seen on an H200 with Triton 3.6: outputs of tiles 32 wide were wrong, those of 64 right
_FLOAT32_HALF = 32  # of a state, half of a tile: right in float32, and wrong in bfloat16
_MOST_STATE = 256


def refusal(rank: int, state: int, wide: torch.dtype) -> str | None:
    """Why the kernels can't take a scan; None when they can."""
    if wide == torch.float64:
        return "its kernels have no float64"
    if rank > _MOST_ROWS:
        return f"its kernels hold at most {_MOST_ROWS} inputs to one state, got {rank}"
    if not 0 < state <= _MOST_STATE:
        return f"its kernels hold a state of 1 to {_MOST_STATE}, got {state}"
    return None


class Sizes(NamedTuple):
    """Sizes of a scan, and of its chunks."""

    batch: int
    length: int
    heads: int
    headdim: int
    rank: int
    groups: int
    state: int
    pairs: int
    steps: int
    half: int
    sequences: int
    slots: int
    single: bool  # no sequence has more than one chunk

    @property
    def rows(self) -> int:
        return self.batch * self.length


def least_tile() -> int:
    """The least side of a tile along channels; what a small case does not fill is zeros."""
    return _LEAST_ROWS if triton.interpreting() else _GPU_TILE


def steps_of_chunk(chunk_size: int, rank: int) -> int:
    """Steps that a chunk has when at most `chunk_size` are asked for: a power of two."""
    ranks = power_of_two(rank)
    below = 1 << (max(1, int(chunk_size)).bit_length() - 1)
    return min(max(below, least_tile() // ranks, 1), _MOST_ROWS // ranks)


def _steps_of_short(length: int, rank: int) -> int:
    """Steps of the chunk that holds a whole sequence without a state before or after it.

    No product with a state is formed then, and what remains takes few rows on the GPU, too.
    """
    return max(power_of_two(length), _LEAST_ROWS // power_of_two(rank), 1)


def _slots(batch: int, length: int, steps: int, cu_seqlens: Tensor | None) -> int:
    """How many places for the chunks of all sequences there are; in a pack enough, wherever its bounds lie."""
    if cu_seqlens is None:
        return batch * ceil_div(length, steps)
    return length // steps + sequence_count(batch, cu_seqlens)


def stored_dtype(inputs: WholeScanInputs) -> torch.dtype:
    """Of states, keys and queries in memory: that in which products take them."""
    # Triton's interpreter cuts off what bfloat16 can't hold, where a GPU rounds.
    return inputs.log_decay.dtype if triton.interpreting() else inputs.x.dtype


def kept(inputs: WholeScanInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """States and angles before every chunk, unfilled; empty without `keep`, and where all of them are zero."""
    size = sizes(inputs)
    count = size.slots if keep and not (size.single and inputs.initial_state is None) else 0
    states = inputs.x.new_empty(count, size.heads, 2 * size.half, size.headdim, dtype=stored_dtype(inputs))
    return states, inputs.x.new_empty(size.slots if keep else 0, size.heads, size.pairs, dtype=torch.int32)


def angles(inputs: WholeScanInputs) -> Tensor:
    """Angles before every chunk, unfilled."""
    return kept(inputs, True)[1]


def sizes(inputs: WholeScanInputs, short: bool = True) -> Sizes:
    """Those of a scan; unless `short` its chunks have the rows that products with a state take."""
    (batch, length, heads, headdim), (rank, groups, state) = inputs.x.shape, inputs.B.shape[2:]
    steps = steps_of_chunk(inputs.chunk_size, rank)
    single = inputs.cu_seqlens is None and length <= steps
    if single and short and inputs.initial_state is None:
        steps = min(steps, _steps_of_short(int(length), rank))
    narrow = inputs.x.dtype == torch.float32 and not triton.interpreting()
    return Sizes(
        batch,
        length,
        heads,
        headdim,
        rank,
        groups,
        state,
        pairs=0 if inputs.speeds is None else inputs.speeds.shape[3],
        steps=steps,
        half=power_of_two((state + 1) // 2, _FLOAT32_HALF if narrow else least_tile()),
        sequences=sequence_count(batch, inputs.cu_seqlens),
        slots=_slots(batch, length, steps, inputs.cu_seqlens),
        single=single,
    )
