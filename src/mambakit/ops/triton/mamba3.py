"""The scan of Mamba-3 on the GPU: what is launched, and in which order.

Forward: the angles (mamba3_angles), the state before every chunk (mamba3_walk), the outputs (mamba3_outputs).
Backward: the gradient of the state after every chunk (mamba3_walk), those of the inputs (mamba3_gradients), and what
the gradients of the angles make of those of speeds and steps (mamba3_angles).

The account for (batch, length, heads, headdim, state) = (8, 2048, 32, 64, 128) in bfloat16, chunks of 64 steps, with z
and 32 pairs that turn. Inputs and y once are 220 MB. Beside them cross device memory: angles within chunks (67 MB
written, then read by each of the two passes) and states (134 MB written, 134 MB read): 0.64 GB forward. The backward
reads states, x, z, grad_y and angles twice over its two passes, writes and reads the states' gradients (134 MB each
way), the gradients of the angles (67 MB each way), and of B and C one float32 partial sum for every few heads (33 MB
each): 1.2 GB. Products are 30 GFLOP forward and 130 GFLOP backward, below what the bytes cost; turning keys and queries
again in each pass costs 34 M sines and cosines, less than to store what was turned (268 MB).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from mambakit.ops.mamba3_inputs import WholeScanInputs
from mambakit.ops.triton import interpreting, mamba3_shapes
from mambakit.ops.triton.mamba3_angles import carried_angles, local_angles, speed_gradients
from mambakit.ops.triton.mamba3_key_gradients import key_gradients
from mambakit.ops.triton.mamba3_outputs import outputs
from mambakit.ops.triton.mamba3_shapes import Sizes, power_of_two, sizes
from mambakit.ops.triton.mamba3_value_gradients import value_gradients
from mambakit.ops.triton.mamba3_walk import hand_on, walk

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_PROGRAMS = 256  # about what fills the chip: below it a sequence is walked in several segments
_LEAST_CHUNKS = 4  # of a segment

CONFIGURATION: dict[str, dict[str, int]] = {
    "walk": {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
    "outputs": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "value_gradients": {"BLOCK": 64, "num_warps": 4, "num_stages": 1},
    "key_gradients": {"BLOCK": 64, "num_warps": 8, "num_stages": 1},
}


def forward(
    inputs: WholeScanInputs, y: Tensor, final_state: Tensor, kept_states: Tensor, angles: Tensor, carries: Tensor
) -> None:
    """Fill y, the final state and, for the backward, the states before every chunk and the angles."""
    size, given = sizes(inputs), _given(inputs)
    if kept_states.shape[0] == 0:
        kept_states, angles, carries = mamba3_shapes.kept(inputs, True)
    table = _sequence_of_slot(inputs, size)
    if inputs.speeds is not None:
        _angles(inputs, given, size, table, angles, carries)
    common = _common(inputs, given, size, angles, carries)
    _walk(inputs, given, size, common, given["initial_state"], final_state, kept_states, None)
    if size.slots:
        block = _block("outputs", size)
        outputs[(size.slots * size.heads, triton.cdiv(size.headdim, block["BLOCK"]))](
            *_rows(given, "x"),
            *_rows(given, "B"),
            *_rows(given, "C"),
            *_rows(given, "z"),
            *(given[name] for name in ("up", "gate", "down", "D", "B_bias", "C_bias")),
            common["angles"],
            common["carries"],
            *(given[name] for name in ("log_decay", "scale", "own")),
            kept_states,
            y,
            inputs.cu_seqlens,
            table,
            size.length,
            size.heads,
            size.headdim,
            size.groups,
            size.rank,
            size.state,
            size.pairs,
            **_shape_of_tiles(inputs, size),
            **block,
        )


def backward(
    inputs: WholeScanInputs, kept: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor, grads: WholeScanInputs
) -> None:
    """Fill `grads`."""
    size, given = sizes(inputs), _given(inputs)
    kept_states, angles, carries = kept
    table = _sequence_of_slot(inputs, size)
    common = _common(inputs, given, size, angles, carries)
    grad_y = grad_y.contiguous()
    kept_grads = torch.empty_like(kept_states)
    first = grads.initial_state
    _walk(inputs, given, size, common, grad_final_state.contiguous(), first, kept_grads, grad_y)
    if not size.slots:
        for tensor in grads:
            if isinstance(tensor, Tensor) and tensor is not first:
                tensor.zero_()
        return

    wide, heads, share = inputs.log_decay, size.heads, size.heads // size.groups
    # In bfloat16 a head's share of the gradients of B and C is kept like an activation.
    dtype = torch.bfloat16 if inputs.x.dtype == torch.bfloat16 else wide.dtype
    grad_B, grad_C = (
        grad if share == 1 else wide.new_empty(share, *grad.shape, dtype=dtype) for grad in _present(grads.B, grads.C)
    )
    make = wide.new_empty if inputs.cu_seqlens is None else wide.new_zeros
    partial = {
        name: None if (grad := getattr(grads, name)) is None else make(size.slots, *grad.shape)
        for name in ("D", "up", "gate", "down", "B_bias", "C_bias")
    }
    turning = inputs.speeds is not None
    grad_angles = wide.new_empty(size.rows, heads, size.pairs) if turning else None
    sums = wide.new_empty(size.slots, heads, size.pairs, dtype=torch.float64) if turning else None
    rows = (*_rows(given, "x"), *_rows(given, "B"), *_rows(given, "C"), *_rows(given, "z"), grad_y, _row_size(grad_y))
    weights = [given[name] for name in ("up", "gate", "down")]
    after = [
        given["B_bias"],
        given["C_bias"],
        common["angles"],
        common["carries"],
        *(given[name] for name in ("log_decay", "scale", "own")),
        kept_states,
        kept_grads,
    ]
    sizes_given = (size.length, size.rows, heads, size.headdim, size.groups, size.rank, size.state, size.pairs)
    grid = (size.slots * heads,)
    value_gradients[grid](
        *rows,
        *weights,
        given["D"],
        *after,
        grads.x,
        grads.z,
        *(partial[name] for name in ("D", "up", "gate", "down")),
        inputs.cu_seqlens,
        table,
        *sizes_given,
        RANKED=inputs.down is None,
        **_shape_of_tiles(inputs, size),
        **_block("value_gradients", size),
    )
    key_gradients[grid](
        *rows,
        *weights,
        *after,
        grad_B,
        grad_C,
        grads.log_decay,
        grads.scale,
        grads.own,
        partial["B_bias"],
        partial["C_bias"],
        grad_angles,
        sums,
        inputs.cu_seqlens,
        table,
        *sizes_given,
        RANKED=inputs.down is None,
        **_shape_of_tiles(inputs, size),
        **_block("key_gradients", size),
    )
    if share > 1:
        for total, parts in zip(_present(grads.B, grads.C), (grad_B, grad_C), strict=True):
            total.copy_(parts.sum(0)) if parts.dtype != total.dtype else torch.sum(parts, 0, out=total)
    for name, parts in partial.items():
        if parts is not None:
            torch.sum(parts, 0, out=getattr(grads, name))
    if turning:
        _angle_gradients(inputs, given, size, table, grad_angles, sums, grads)


def _given(inputs: WholeScanInputs) -> dict[str, Any]:
    """The inputs, those with a row a step as they lie if their rows are whole, the rest contiguous."""
    rows = ("x", "B", "C", "z")
    return {
        name: value if not isinstance(value, Tensor) else _whole_rows(value) if name in rows else value.contiguous()
        for name, value in inputs._asdict().items()
    }


def _whole_rows(tensor: Tensor) -> Tensor:
    """(batch, length, ...) with each step's numbers side by side, and one stride from row to row of all batches."""
    batch, length = tensor.shape[:2]
    inner, expected = tensor.stride()[2:], 1
    for extent, stride in zip(reversed(tensor.shape[2:]), reversed(inner), strict=True):
        if extent != 1 and stride != expected:
            return tensor.contiguous()
        expected *= extent
    if batch > 1 and tensor.stride(0) != length * tensor.stride(1):
        return tensor.contiguous()
    return tensor


def _rows(given: Mapping[str, Any], name: str) -> tuple[Tensor | None, int]:
    tensor = given[name]
    return tensor, 0 if tensor is None else tensor.stride(1)


def _sequence_of_slot(inputs: WholeScanInputs, size: Sizes) -> Tensor | None:
    """For every slot of a pack the sequence that it belongs to."""
    bounds = inputs.cu_seqlens
    if bounds is None or size.sequences == 0:
        return None
    first = bounds[:-1] // size.steps + torch.arange(size.sequences, device=bounds.device, dtype=bounds.dtype)
    slot = torch.arange(size.slots, device=bounds.device, dtype=bounds.dtype)
    return (torch.searchsorted(first, slot, right=True) - 1).to(torch.int32)


def _common(
    inputs: WholeScanInputs, given: Mapping[str, Any], size: Sizes, angles: Tensor, carries: Tensor
) -> dict[str, Any]:
    turning = inputs.speeds is not None
    return {"angles": angles if turning else None, "carries": carries if turning else None}


def _shape_of_tiles(inputs: WholeScanInputs, size: Sizes) -> dict[str, Any]:
    return {
        "STEPS": size.steps,
        "RANKS": power_of_two(size.rank),
        "HALF": size.half,
        "INTERLEAVED": inputs.interleaved,
        "FAST": not interpreting(),
        "PRECISION": "ieee" if interpreting() else _PRECISION[inputs.x.dtype],  # it has no products in bfloat16
    }


def _block(kernel: str, size: Sizes) -> dict[str, int]:
    chosen = dict(CONFIGURATION[kernel])
    chosen["BLOCK"] = min(chosen["BLOCK"], power_of_two(size.headdim, 16))
    return chosen


def _angles(
    inputs: WholeScanInputs,
    given: Mapping[str, Any],
    size: Sizes,
    table: Tensor | None,
    angles: Tensor,
    carries: Tensor,
) -> None:
    constants = {"STEPS": size.steps, "PAIRS": power_of_two(size.pairs)}
    if size.slots:
        local_angles[(size.slots * size.heads,)](
            given["speeds"],
            given["steps"],
            angles,
            carries,
            inputs.cu_seqlens,
            table,
            size.length,
            size.heads,
            given["speeds"].shape[2],
            size.pairs,
            **constants,
        )
        _carry(inputs, size, carries, given["initial_angle"], None, False)


def _carry(
    inputs: WholeScanInputs, size: Sizes, sums: Tensor, first: Tensor | None, last: Tensor | None, reverse: bool
) -> None:
    carried_angles[(size.sequences * size.heads,)](
        sums,
        first,
        last,
        inputs.cu_seqlens,
        size.length,
        size.heads,
        size.pairs,
        STEPS=size.steps,
        PAIRS=power_of_two(size.pairs),
        CHUNKS=32,
        REVERSE=reverse,
    )


def _angle_gradients(
    inputs: WholeScanInputs,
    given: Mapping[str, Any],
    size: Sizes,
    table: Tensor | None,
    grad_angles: Tensor | None,
    sums: Tensor | None,
    grads: WholeScanInputs,
) -> None:
    assert grads.speeds is not None
    assert sums is not None
    _carry(inputs, size, sums, None, grads.initial_angle, True)
    speed_heads = grads.speeds.shape[2]
    shared = speed_heads == 1
    heads_a_program = _divisor(size.heads, 8, size.slots * size.heads // _PROGRAMS)
    blocks = size.heads // heads_a_program
    parts = grads.speeds if not shared or blocks == 1 else grads.speeds.new_empty(blocks, *grads.speeds.shape)
    speed_gradients[(size.slots * blocks,)](
        grad_angles,
        sums,
        given["speeds"],
        given["steps"],
        parts,
        grads.steps,
        inputs.cu_seqlens,
        table,
        size.length,
        size.rows,
        size.heads,
        speed_heads,
        size.pairs,
        heads_a_program,
        STEPS=size.steps,
        PAIRS=power_of_two(size.pairs),
        SHARED=shared,
    )
    if parts is not grads.speeds:
        torch.sum(parts, 0, out=grads.speeds)


def _walk(
    inputs: WholeScanInputs,
    given: Mapping[str, Any],
    size: Sizes,
    common: Mapping[str, Any],
    first: Tensor | None,
    last: Tensor | None,
    kept_states: Tensor,
    grad_y: Tensor | None,
) -> None:
    """Walk forwards; with grad_y backwards."""
    if size.sequences == 0:
        return
    reverse = grad_y is not None
    block = _block("walk", size)
    programs = size.sequences * size.heads * triton.cdiv(size.headdim, block["BLOCK"])
    chunks = triton.cdiv(size.length, size.steps)
    segments = max(1, min(_PROGRAMS // programs, chunks // _LEAST_CHUNKS))
    segment_chunks = max(1, triton.cdiv(chunks, segments))
    handed = decays = None
    if segments > 1:
        shape = (segments, size.sequences, size.heads)
        handed = inputs.log_decay.new_empty(*shape, size.headdim, 2 * size.half)
        decays = inputs.log_decay.new_empty(shape)

    def run(summary: bool) -> None:
        walk[(programs, segments)](
            *((grad_y, _row_size(grad_y)) if grad_y is not None else _rows(given, "x")),
            *(_rows(given, "z") if reverse else (None, 0)),
            None if reverse else given["up"],
            given["gate"] if reverse else None,
            given["down"] if reverse else None,
            *_rows(given, "C" if reverse else "B"),
            given["C_bias" if reverse else "B_bias"],
            common["angles"],
            common["carries"],
            given["log_decay"],
            given["scale"],
            None if handed is not None else first,
            None if summary else last,
            None if summary else kept_states,
            handed,
            decays,
            inputs.cu_seqlens,
            size.length,
            segment_chunks,
            size.heads,
            size.headdim,
            size.groups,
            size.rank,
            size.state,
            size.pairs,
            REVERSE=reverse,
            SUMMARY=summary,
            RANKED=reverse and inputs.down is None,
            **_shape_of_tiles(inputs, size),
            **block,
        )

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
            INTERLEAVED=inputs.interleaved,
        )
    run(summary=False)


def _row_size(tensor: Tensor) -> int:
    """Numbers of one step."""
    return math.prod(tensor.shape[2:])


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _divisor(number: int, most: int, filling: int) -> int:
    """The greatest divisor of `number` that is neither above `most` nor, but for 1, above `filling`."""
    return next(d for d in range(min(number, most, max(1, filling)), 0, -1) if number % d == 0)
