"""What the two passes of the Mamba-3 scan share on the GPU: its inputs as kernels take them, and their launches."""

import math
from typing import Any

import torch
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import interpreting, mamba3_shapes
from mambakit.ops.triton.mamba3_angles import finish_turns, later_sums
from mambakit.ops.triton.mamba3_chunk import prepare
from mambakit.ops.triton.mamba3_keys import carry_turns, keys_and_queries, vector_gradients
from mambakit.ops.triton.mamba3_outputs import walk_outputs
from mambakit.ops.triton.mamba3_shapes import Sizes, power_of_two, sizes
from mambakit.ops.triton.mamba3_walk import walk
from mambakit.ops.triton.state_passing import pass_states

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32x3"}
_PROGRAMS = 256  # about what fills the chip: below it a sequence is walked in several segments
_LEAST_CHUNKS = 4  # of a segment
_HEADS = 8  # to a program of `prepare`
_PAIRS = 16  # to a program of `vector_gradients`

CONFIGURATION: dict[str, dict[str, int]] = {
    "walk": {"BLOCK": 64, "num_warps": 4, "STAGES": 3},
    "walk_outputs": {"BLOCK": 64, "num_warps": 4, "STAGES": 1},
    "gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "keys_and_queries": {"num_warps": 8},
    "vector_gradients": {"num_warps": 4, "STAGES": 2},
}


class Scan:
    """One scan's inputs as the kernels take them, and the launches that both passes share."""

    def __init__(self, inputs: WholeScanInputs) -> None:
        self.inputs, self.size = inputs, sizes(inputs)
        rows = ("x", "B", "C", "z")
        self.given: dict[str, Any] = {
            name: value if not isinstance(value, Tensor) else _whole_rows(value) if name in rows else value.contiguous()
            for name, value in inputs._asdict().items()
            if name != "D"
        }
        self.table = (inputs.cu_seqlens, _sequence_of_slot(inputs, self.size))
        self.speed_heads = 1 if inputs.speeds is None else inputs.speeds.shape[2]
        self.cut = {"STEPS": self.size.steps, "RANKS": power_of_two(self.size.rank), "HALF": self.size.half}
        # The interpreter has no products in bfloat16.
        precision = "ieee" if interpreting() else _PRECISION[inputs.x.dtype]
        self.tiles = {**self.cut, "FINE": inputs.x.dtype == torch.float32, "PRECISION": precision}
        runs = inputs.log_decay.new_empty(4, self.size.slots, self.size.heads, self.size.steps)
        self.runs = runs, runs.stride(0)
        D = inputs.D
        self.skip = (D, 0, 0) if D is None else (D, *D.stride())  # one number for all channels of a head is not spread
        self.vectors = {**self.cut, "INTERLEAVED": inputs.interleaved, "FAST": not interpreting()}

    def rows(self, name: str) -> tuple[Tensor | None, int]:
        """An input with a row a step, and its stride."""
        tensor = self.given[name]
        return tensor, 0 if tensor is None else tensor.stride(1)

    def block(self, kernel: str, whole: bool = False) -> dict[str, int]:
        """How a kernel is cut and launched; a program takes all the channels of a head if `whole`."""
        chosen = dict(CONFIGURATION[kernel])
        if "STAGES" in chosen and (self.inputs.x.dtype == torch.float32 or self.size.state > 128):
            chosen["STAGES"] = 1  # more would not fit the chip's memory
        chosen["BLOCK"] = min(chosen["BLOCK"], power_of_two(self.size.headdim, mamba3_shapes.least_tile()))
        return {**chosen, "CHANNEL_BLOCKS": -(-self.size.headdim // chosen["BLOCK"])} if whole else chosen

    def partial(self, grad: Tensor | None) -> Tensor | None:
        """Room for the share that every chunk has in a gradient; a pack's unused slots have none."""
        if grad is None:
            return None
        make = grad.new_empty if self.inputs.cu_seqlens is None else grad.new_zeros
        return make(self.size.slots, *grad.shape)

    def prepare(self, turns: Tensor | None) -> None:
        """Fill the runs, and with `turns` how far each chunk turns."""
        size, given = self.size, self.given
        if not size.slots or not size.heads:
            return
        turning = turns is not None and given["speeds"] is not None
        prepare[(size.slots, -(-size.heads // _HEADS))](
            given["log_decay"],
            given["scale"],
            given["own"],
            self.runs[0],
            given["speeds"] if turning else None,
            given["steps"],
            turns,
            *self.table,
            size.length,
            size.heads,
            self.speed_heads,
            size.pairs,
            STEPS=size.steps,
            HEADS=_HEADS,
            PAIRS=power_of_two(size.pairs),
            FINE=self.tiles["FINE"],
        )

    def carry_turns(self, carries: Tensor) -> None:
        """Turn what each chunk turns by into the angles before it."""
        size = self.size
        if not size.slots or self.given["speeds"] is None:
            return
        carry_turns[(size.sequences * size.heads,)](
            carries,
            self.given["initial_angle"],
            self.inputs.cu_seqlens,
            size.length,
            size.heads,
            size.pairs,
            CHUNKS=32,
            STEPS=size.steps,
            PAIRS=power_of_two(size.pairs),
        )

    def keys_and_queries(self, carries: Tensor) -> tuple[Tensor, Tensor]:
        """(slots, heads, rows, columns) each."""
        size, given = self.size, self.given
        shape = (size.slots, size.heads, self.cut["STEPS"] * self.cut["RANKS"], 2 * size.half)
        dtype = mamba3_shapes.stored_dtype(self.inputs)
        keys, queries = (self.inputs.x.new_empty(shape, dtype=dtype) for _ in range(2))
        if size.slots:
            keys_and_queries[(size.slots * size.heads,)](
                *self.rows("B"),
                *self.rows("C"),
                given["B_bias"],
                given["C_bias"],
                given["speeds"],
                given["steps"],
                carries,
                keys,
                queries,
                *self.table,
                size.length,
                size.heads,
                size.groups,
                size.rank,
                size.state,
                self.speed_heads,
                size.pairs,
                **self.vectors,
                **CONFIGURATION["keys_and_queries"],
            )
        return keys, queries

    def walk_outputs(self, keys: Tensor, queries: Tensor, y: Tensor, last: Tensor, kept: Tensor) -> None:
        """Fill y, the last states and, unless `kept` is empty, the states before every chunk."""
        size, given = self.size, self.given
        block = self.block("walk_outputs")
        programs, segments, segment_chunks = self.cut_walk(block)
        if programs == 0:
            return
        first, written = given["initial_state"], last
        if segments > 1:
            first, written = self.segment_states(keys, None, first, last), None
        walk_outputs[(programs, segments)](
            *self.rows("x"),
            keys,
            queries,
            *self.rows("z"),
            *(given[name] for name in ("up", "gate", "down")),
            *self.skip,
            *self.runs,
            first,
            written,
            kept if kept.shape[0] else None,
            y,
            self.inputs.cu_seqlens,
            size.length,
            segment_chunks,
            size.heads,
            size.headdim,
            size.rank,
            size.state,
            INTERLEAVED=self.inputs.interleaved,
            **self.tiles,
            **block,
        )

    def walk_back(
        self, queries: Tensor, grad_y: Tensor, grad_last: Tensor, grad_first: Tensor | None, kept_grads: Tensor
    ) -> None:
        """Fill the gradients of the states after every chunk, and of the first states."""
        programs, segments, _ = self.cut_walk(self.block("walk"))
        if programs == 0:
            return
        if segments == 1:
            self.walk(queries, grad_y, grad_last, grad_first, kept_grads, None)
        else:
            later = self.segment_states(queries, grad_y, grad_last, grad_first)
            self.walk(queries, grad_y, later, None, kept_grads, None)

    def cut_walk(self, block: dict[str, int]) -> tuple[int, int, int]:
        """Programs along a segment, segments of a sequence, and chunks of a segment."""
        size = self.size
        programs = size.sequences * size.heads * -(-size.headdim // block["BLOCK"])
        chunks = -(-size.length // size.steps)
        segments = max(1, min(_PROGRAMS // programs, chunks // _LEAST_CHUNKS)) if programs else 1
        return programs, segments, max(1, -(-chunks // segments))

    def segment_states(self, keys: Tensor, grad_y: Tensor | None, first: Tensor | None, last: Tensor | None) -> Tensor:
        """The state before every segment, and `last` filled; with grad_y the gradient of the state after each."""
        size, wide = self.size, self.inputs.log_decay
        _, segments, _ = self.cut_walk(self.block("walk"))
        parts = wide.new_empty(size.sequences * segments, size.heads, size.headdim, size.state)
        factors = wide.new_empty(size.sequences * segments, size.heads)
        self.walk(keys, grad_y, None, parts, None, factors)
        pass_states(parts, factors, first, last, reverse=grad_y is not None)
        return parts

    def walk(
        self,
        keys: Tensor,
        grad_y: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        kept: Tensor | None,
        factors: Tensor | None,
    ) -> None:
        """Walk forwards, with grad_y backwards, from `first` of every segment or zero."""
        size, given = self.size, self.given
        reverse = grad_y is not None
        block = self.block("walk")
        programs, segments, segment_chunks = self.cut_walk(block)
        walk[(programs, segments)](
            *((grad_y, row_size(grad_y)) if grad_y is not None else self.rows("x")),
            *(self.rows("z") if reverse else (None, 0)),
            None if reverse else given["up"],
            given["gate"] if reverse else None,
            given["down"] if reverse else None,
            keys,
            *self.runs,
            first,
            last,
            kept,
            factors,
            self.inputs.cu_seqlens,
            size.length,
            segment_chunks,
            size.heads,
            size.headdim,
            size.rank,
            size.state,
            REVERSE=reverse,
            RANKED=reverse and self.inputs.down is None,
            INTERLEAVED=self.inputs.interleaved,
            **self.tiles,
            **block,
        )

    def vector_gradients(
        self,
        grad_keys: Tensor,
        grad_queries: Tensor,
        grad_angles: Tensor | None,
        carries: Tensor,
        grads: WholeScanInputs,
    ) -> None:
        """Of B, C, their biases, speeds, steps and initial angles, from those of the keys and queries."""
        size, given, wide = self.size, self.given, self.inputs.log_decay
        biases = [self.partial(grad) for grad in (grads.B_bias, grads.C_bias)]
        columns = min(_PAIRS, size.half)
        shared, blocks = self.speed_heads == 1, -(-size.pairs // columns)
        shares = step_shares = sums = None
        if grads.speeds is not None:
            shares = wide.new_empty(size.groups, *grads.speeds.shape) if shared else grads.speeds
            step_shares = wide.new_empty(blocks, size.rows, size.heads)
            sums = wide.new_empty(size.slots, size.heads, size.pairs, dtype=torch.float64)
        vector_gradients[(size.slots * size.groups, -(-size.half // columns))](
            given["speeds"],
            given["steps"],
            carries,
            grad_keys,
            grad_queries,
            grad_angles,
            grads.B,
            grads.C,
            *biases,
            shares,
            step_shares,
            sums,
            *self.table,
            size.length,
            size.rows,
            size.heads,
            size.groups,
            size.rank,
            size.state,
            self.speed_heads,
            size.pairs,
            COLUMNS=columns,
            SHARED=shared,
            **self.vectors,
            **CONFIGURATION["vector_gradients"],
        )
        for parts, grad in zip(biases, (grads.B_bias, grads.C_bias), strict=True):
            if parts is not None:
                torch.sum(parts, 0, out=grad)
        if grads.speeds is None:
            return
        turns = {"STEPS": size.steps, "PAIRS": power_of_two(size.pairs)}
        later_sums[(size.sequences * size.heads,)](
            sums, grads.initial_angle, self.inputs.cu_seqlens, size.length, size.heads, size.pairs, CHUNKS=32, **turns
        )
        finish_turns[(size.slots,)](
            sums,
            given["speeds"],
            given["steps"],
            shares,
            step_shares,
            grads.speeds,
            grads.steps,
            *self.table,
            size.length,
            size.rows,
            size.heads,
            size.groups,
            self.speed_heads,
            size.pairs,
            BLOCKS=blocks,
            SHARED=shared,
            **turns,
        )


def _whole_rows(tensor: Tensor) -> Tensor:
    """(batch, length, ...) with each step's numbers side by side, and one stride from row to row of all batches."""
    batch, length = tensor.shape[:2]
    expected = 1
    for extent, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if extent != 1 and stride != expected:
            return tensor.contiguous()
        expected *= extent
    if batch > 1 and tensor.stride(0) != length * tensor.stride(1):
        return tensor.contiguous()
    return tensor


def _sequence_of_slot(inputs: WholeScanInputs, size: Sizes) -> Tensor | None:
    """For every slot of a pack the sequence that it belongs to."""
    bounds = inputs.cu_seqlens
    if bounds is None or size.sequences == 0:
        return None
    first = bounds[:-1] // size.steps + torch.arange(size.sequences, device=bounds.device, dtype=bounds.dtype)
    slot = torch.arange(size.slots, device=bounds.device, dtype=bounds.dtype)
    return (torch.searchsorted(first, slot, right=True) - 1).to(torch.int32)


def row_size(tensor: Tensor) -> int:
    """Numbers of one step."""
    return math.prod(tensor.shape[2:])
