"""Hands states on from one part of a sequence to the next: the sequential rest of a scan that works in parallel parts.

A scan that cuts sequences into parts first finds for each what it adds to the state, E_k (its last state from zero),
and what it keeps of the state before it, the factor f_k. Then

    S_{k+1} = f_k S_k + E_k        forward, from the initial state
    G_{k-1} = f_k G_k + E_k        backward, from the gradient of the final state, E_k being what the outputs of part k
                                   send to the state before it

are the same recurrence in the two directions. A state may have any inner shape: it is a row of numbers here.
"""

import triton
import triton.language as tl
from torch import Tensor

from mambakit.ops.triton.counting import ceil_div
from mambakit.ops.triton.launch import Kernel

_BLOCK = 256  # numbers of a state to a program


def pass_states(
    parts: Tensor,
    factors: Tensor,
    start: Tensor | None,
    end: Tensor | None = None,
    first_part: Tensor | None = None,
    *,
    reverse: bool = False,
    sequences: int | None = None,
) -> None:
    """Replace what each part adds by the state that it starts from (with `reverse`, by the gradient at its end).

    Args:
        parts: (parts, heads, ...), float32 and contiguous: E on entry, S (or G) on return. The parts of a sequence
            follow one another.
        factors: (parts, heads), float32 and contiguous.
        start: (sequences, heads, ...), contiguous: the initial states, or with `reverse` the gradients of the final
            ones; None for zero.
        end: (sequences, heads, ...), contiguous: filled with the states after the last part, or with `reverse` the
            gradients of the initial ones.
        first_part: (sequences + 1,), int32 or int64: sequence i has the parts [first_part[i], first_part[i + 1]). None
            where `end`, `start` or `sequences` tells how many sequences there are, each with equally many parts.
        sequences: how many there are, where nothing else tells.
    """
    count, heads = factors.shape
    known = start if start is not None else end
    if first_part is not None:
        sequences = first_part.shape[0] - 1
    elif known is not None:
        sequences = known.shape[0]
    elif sequences is None:
        raise ValueError("how many sequences there are must follow from first_part, start, end or sequences")
    values = parts[0, 0].numel() if parts.numel() else 0
    if sequences == 0 or heads == 0 or values == 0:
        return
    absent = factors
    _pass_states[(sequences, heads, ceil_div(values, _BLOCK))](
        parts, factors, absent if start is None else start, absent if end is None else end,
        absent if first_part is None else first_part, count // sequences, heads, values,
        HAS_START=start is not None, HAS_END=end is not None, PACKED=first_part is not None, REVERSE=reverse,
        BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip


@Kernel
@triton.jit(do_not_specialize=["count"])
def _pass_states(
    parts, factors, start, end, first_part,
    count, heads, values,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of the numbers of a head's state, over the parts of a sequence."""
    head, sequence = tl.program_id(1), tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.load(first_part + sequence).to(tl.int64)
        count = (tl.load(first_part + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * count
    value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = value < values
    whole = (sequence * heads + head) * values
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        state = tl.load(start + whole + value, mask=inside, other=0.0).to(tl.float32)
    for step in range(count):
        part = first + (count - 1 - step if REVERSE else step)
        row = part * heads + head
        place = parts + row * values + value
        added = tl.load(place, mask=inside, other=0.0)
        factor = tl.load(factors + row)
        tl.store(place, state, mask=inside)
        state = state * factor + added
    if HAS_END:
        tl.store(end + whole + value, state, mask=inside)
