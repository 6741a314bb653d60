"""The scan of Mamba-3 on the GPU: what is launched, and in which order.

Forward: keys and queries of every head (mamba3_keys), the state before every chunk (mamba3_walk), the outputs
(mamba3_outputs). Backward: keys and queries again, the gradient of the state after every chunk (mamba3_walk), those of
values and gates (mamba3_value_gradients), of keys, queries and weights (mamba3_key_gradients), of B and C from these
(mamba3_keys), and of speeds and steps from those of the angles (mamba3_angles).

The account for (batch, length, heads, headdim, state) = (8, 2048, 32, 64, 128) in bfloat16, chunks of 64 steps, with z
and 32 pairs that turn. x, z, B, C and y once are 210 MB. Keys and queries of every head are 268 MB, states 134 MB.
Forward: keys and queries written; keys, x read and states written; all of these and z read, y written: 1.1 GB.
Backward: keys and queries written again; queries, z, grad_y read and the states' gradients written; then twice all of
these read, grad_x and grad_z written (67 MB each), the gradients of keys and queries written and read (268 MB each
way), those of the angles (67 MB each way): 2.9 GB. Products are 30 GFLOP forward and 130 GFLOP backward, far below the
bytes.
A single pass that turns keys and queries on chip saves 0.5 GB forward; tried, it ran several times slower: the turning
is repeated in every layout that a product asks for, and its registers spill.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import interpreting, mamba3_shapes
from mambakit.ops.triton.mamba3_angles import later_sums, speed_gradients
from mambakit.ops.triton.mamba3_key_gradients import key_gradients
from mambakit.ops.triton.mamba3_keys import carry_turns, chunk_turns, keys_and_queries, vector_gradients
from mambakit.ops.triton.mamba3_outputs import outputs
from mambakit.ops.triton.mamba3_shapes import Sizes, power_of_two, sizes
from mambakit.ops.triton.mamba3_value_gradients import value_gradients
from mambakit.ops.triton.mamba3_walk import hand_on, walk

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_PROGRAMS = 256  # about what fills the chip: below it a sequence is walked in several segments
_LEAST_CHUNKS = 4  # of a segment

CONFIGURATION: dict[str, dict[str, int]] = {
    "walk": {"BLOCK": 64, "num_warps": 8, "num_stages": 2},
    "outputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "value_gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "key_gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "keys_and_queries": {"num_warps": 8},
    "vector_gradients": {"num_warps": 4, "num_stages": 1},
}
MOST_HEADS = {"vector_gradients": 8, "speed_gradients": 8}  # that a program takes one after another


def forward(inputs: WholeScanInputs, y: Tensor, final_state: Tensor, kept_states: Tensor, carries: Tensor) -> None:
    """Fill y, the final state and, for the backward, the states and angles before every chunk."""
    if kept_states.shape[0] == 0:
        kept_states, carries = mamba3_shapes.kept(inputs, True)
    scan = _Scan(inputs)
    if inputs.speeds is not None:
        scan.carry_turns(carries)
    keys, queries = scan.keys_and_queries(carries)
    scan.walk(keys, scan.given["initial_state"], final_state, kept_states, None)
    size, given = scan.size, scan.given
    if size.slots:
        block = scan.block("outputs")
        outputs[(size.slots * size.heads, triton.cdiv(size.headdim, block["BLOCK"]))](
            *scan.rows("x"),
            keys,
            queries,
            *scan.rows("z"),
            *(given[name] for name in ("up", "gate", "down", "D", "log_decay", "scale", "own")),
            kept_states,
            y,
            *scan.table,
            size.length,
            size.heads,
            size.headdim,
            size.rank,
            **scan.tiles,
            **block,
        )


def backward(
    inputs: WholeScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: WholeScanInputs
) -> None:
    """Fill `grads`."""
    scan = _Scan(inputs)
    size, given = scan.size, scan.given
    kept_states, carries = kept
    keys, queries = scan.keys_and_queries(carries)
    grad_y = grad_y.contiguous()
    kept_grads = torch.empty_like(kept_states)
    scan.walk(queries, grad_final_state.contiguous(), grads.initial_state, kept_grads, grad_y)
    if not size.slots:
        for tensor in grads:
            if isinstance(tensor, Tensor) and tensor is not grads.initial_state:
                tensor.zero_()
        return

    partial = {name: scan.partial(getattr(grads, name)) for name in ("D", "up", "gate", "down")}
    before = (*scan.rows("x"), keys, queries, *scan.rows("z"), grad_y, _row_size(grad_y))
    after = (*(given[name] for name in ("log_decay", "scale", "own")), kept_states, kept_grads)
    given_sizes = (size.length, size.heads, size.headdim, size.rank)
    weights = [given[name] for name in ("up", "gate", "down")]
    value_gradients[(size.slots * size.heads,)](
        *before,
        *weights,
        given["D"],
        *after,
        grads.x,
        grads.z,
        *partial.values(),
        *scan.table,
        *given_sizes,
        RANKED=inputs.down is None,
        **scan.tiles,
        **scan.block("value_gradients", whole=True),
    )
    for name, parts in partial.items():
        if parts is not None:
            torch.sum(parts, 0, out=getattr(grads, name))
    grad_angles = sums = None
    if inputs.speeds is not None:
        grad_angles = inputs.log_decay.new_empty(size.rows, size.heads, size.pairs)
        sums = inputs.log_decay.new_empty(size.slots, size.heads, size.pairs, dtype=torch.float64)
    grad_keys, grad_queries = torch.empty_like(keys), torch.empty_like(queries)
    for of_keys, found in ((False, grad_queries), (True, grad_keys)):
        key_gradients[(size.slots * size.heads,)](
            *before,
            *weights,
            *after,
            found,
            grads.log_decay,
            grads.scale,
            grads.own,
            grad_angles,
            sums,
            *scan.table,
            *given_sizes,
            size.pairs,
            OF_KEYS=of_keys,
            RANKED=inputs.down is None,
            **scan.tiles,
            **scan.block("key_gradients", whole=True),
        )
    scan.vector_gradients(grad_keys, carries, grads.B, grads.B_bias)
    scan.vector_gradients(grad_queries, carries, grads.C, grads.C_bias)
    if grad_angles is not None and sums is not None:
        scan.speed_gradients(grad_angles, sums, grads)


class _Scan:
    """One scan's inputs as the kernels take them, and the launches that both passes share."""

    def __init__(self, inputs: WholeScanInputs) -> None:
        self.inputs, self.size = inputs, sizes(inputs)
        rows = ("x", "B", "C", "z")
        self.given: dict[str, Any] = {
            name: value if not isinstance(value, Tensor) else _whole_rows(value) if name in rows else value.contiguous()
            for name, value in inputs._asdict().items()
        }
        self.table = (inputs.cu_seqlens, _sequence_of_slot(inputs, self.size))
        self.speed_heads = 1 if inputs.speeds is None else inputs.speeds.shape[2]
        self.cut = {"STEPS": self.size.steps, "RANKS": power_of_two(self.size.rank), "HALF": self.size.half}
        # The interpreter has no products in bfloat16.
        self.tiles = {**self.cut, "PRECISION": "ieee" if interpreting() else _PRECISION[inputs.x.dtype]}
        self.vectors = {**self.cut, "INTERLEAVED": inputs.interleaved, "FAST": not interpreting()}

    def rows(self, name: str) -> tuple[Tensor | None, int]:
        """An input with a row a step, and its stride."""
        tensor = self.given[name]
        return tensor, 0 if tensor is None else tensor.stride(1)

    def block(self, kernel: str, whole: bool = False) -> dict[str, int]:
        """How a kernel is cut and launched; a program takes all the channels of a head if `whole`."""
        chosen = dict(CONFIGURATION[kernel])
        chosen["BLOCK"] = min(chosen["BLOCK"], power_of_two(self.size.headdim, mamba3_shapes.least_tile()))
        return {**chosen, "CHANNEL_BLOCKS": triton.cdiv(self.size.headdim, chosen["BLOCK"])} if whole else chosen

    def partial(self, grad: Tensor | None) -> Tensor | None:
        """Room for the share that every chunk has in a gradient; a pack's unused slots have none."""
        if grad is None:
            return None
        make = grad.new_empty if self.inputs.cu_seqlens is None else grad.new_zeros
        return make(self.size.slots, *grad.shape)

    def carry_turns(self, carries: Tensor) -> None:
        """Fill the angles before every chunk."""
        size = self.size
        if not size.slots:
            return
        pairs = {"STEPS": size.steps, "PAIRS": power_of_two(size.pairs)}
        speeds, steps = self.given["speeds"], self.given["steps"]
        chunk_turns[(size.slots * size.heads,)](
            speeds, steps, carries, *self.table, size.length, size.heads, self.speed_heads, size.pairs, **pairs
        )
        carry_turns[(size.sequences * size.heads,)](
            carries,
            self.given["initial_angle"],
            self.inputs.cu_seqlens,
            size.length,
            size.heads,
            size.pairs,
            CHUNKS=32,
            **pairs,
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

    def walk(
        self, keys: Tensor, first: Tensor | None, last: Tensor | None, kept: Tensor, grad_y: Tensor | None
    ) -> None:
        """Walk forwards; with grad_y backwards."""
        size, given = self.size, self.given
        if size.sequences == 0:
            return
        reverse = grad_y is not None
        block = self.block("walk")
        programs = size.sequences * size.heads * triton.cdiv(size.headdim, block["BLOCK"])
        chunks = triton.cdiv(size.length, size.steps)
        segments = max(1, min(_PROGRAMS // programs, chunks // _LEAST_CHUNKS)) if programs else 1
        segment_chunks = max(1, triton.cdiv(chunks, segments))
        handed = decays = None
        if segments > 1:
            shape = (segments, size.sequences, size.heads)
            handed = self.inputs.log_decay.new_empty(*shape, 2 * size.half, size.headdim)
            decays = self.inputs.log_decay.new_empty(shape)

        def run(summary: bool) -> None:
            walk[(programs, segments)](
                *((grad_y, _row_size(grad_y)) if grad_y is not None else self.rows("x")),
                *(self.rows("z") if reverse else (None, 0)),
                None if reverse else given["up"],
                given["gate"] if reverse else None,
                given["down"] if reverse else None,
                keys,
                given["log_decay"],
                given["scale"],
                None if handed is not None else first,
                None if summary else last,
                None if summary else kept,
                handed,
                decays,
                self.inputs.cu_seqlens,
                size.length,
                segment_chunks,
                size.heads,
                size.headdim,
                size.rank,
                size.state,
                REVERSE=reverse,
                SUMMARY=summary,
                RANKED=reverse and self.inputs.down is None,
                INTERLEAVED=self.inputs.interleaved,
                **self.tiles,
                **block,
            )

        if programs == 0:
            return
        if handed is not None:
            run(summary=True)
            channels = min(16, power_of_two(size.headdim))
            hand_on[(size.sequences * size.heads, triton.cdiv(size.headdim, channels))](
                handed,
                decays,
                first,
                segments,
                size.sequences,
                size.heads,
                size.headdim,
                size.state,
                HALF=size.half,
                CHANNELS=channels,
                REVERSE=reverse,
                INTERLEAVED=self.inputs.interleaved,
            )
        run(summary=False)

    def vector_gradients(self, grads: Tensor, carries: Tensor, grad: Tensor | None, grad_bias: Tensor | None) -> None:
        """Of B or C and its bias, from those of the keys or queries."""
        assert grad is not None
        size, share = self.size, self.size.heads // self.size.groups
        heads_a_program = _divisor(share, MOST_HEADS["vector_gradients"], size.slots * size.heads // (4 * _PROGRAMS))
        blocks = share // heads_a_program
        parts = grad if blocks == 1 else self.inputs.log_decay.new_empty(blocks, *grad.shape)
        bias_parts = self.partial(grad_bias)
        vector_gradients[(size.slots * (size.heads // heads_a_program),)](
            self.given["speeds"],
            self.given["steps"],
            carries,
            grads,
            parts,
            bias_parts,
            *self.table,
            size.length,
            size.rows,
            heads_a_program,
            size.heads,
            size.groups,
            size.rank,
            size.state,
            self.speed_heads,
            size.pairs,
            **self.vectors,
            **CONFIGURATION["vector_gradients"],
        )
        if parts is not grad:
            grad.copy_(parts.sum(0))
        if bias_parts is not None:
            torch.sum(bias_parts, 0, out=grad_bias)

    def speed_gradients(self, grad_angles: Tensor, sums: Tensor, grads: WholeScanInputs) -> None:
        """Of speeds, steps and initial angles."""
        assert grads.speeds is not None
        size = self.size
        pairs = {"STEPS": size.steps, "PAIRS": power_of_two(size.pairs)}
        later_sums[(size.sequences * size.heads,)](
            sums, grads.initial_angle, self.inputs.cu_seqlens, size.length, size.heads, size.pairs, CHUNKS=32, **pairs
        )
        shared = self.speed_heads == 1
        heads_a_program = _divisor(
            size.heads, MOST_HEADS["speed_gradients"], size.slots * size.heads // (4 * _PROGRAMS)
        )
        blocks = size.heads // heads_a_program
        parts = grads.speeds if not shared or blocks == 1 else grads.speeds.new_empty(blocks, *grads.speeds.shape)
        speed_gradients[(size.slots * blocks,)](
            grad_angles,
            sums,
            self.given["speeds"],
            self.given["steps"],
            parts,
            grads.steps,
            *self.table,
            size.length,
            size.rows,
            size.heads,
            self.speed_heads,
            size.pairs,
            heads_a_program,
            SHARED=shared,
            **pairs,
        )
        if parts is not grads.speeds:
            torch.sum(parts, 0, out=grads.speeds)


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


def _row_size(tensor: Tensor) -> int:
    """Numbers of one step."""
    return math.prod(tensor.shape[2:])


def _divisor(number: int, most: int, filling: int) -> int:
    """The greatest divisor of `number` that is neither above `most` nor, but for 1, above `filling`."""
    return next(d for d in range(min(number, most, max(1, filling)), 0, -1) if number % d == 0)
