"""A linear recurrence h_t = a_t h_{t-1} + b_t as a prefix sum, in four orders of work that give one result.

Two steps in a row are one step: (a, b) then (a', b') is (a' a, a' b + b'). This is associative, and so the steps may be
combined in any grouping (Blelloch 1990):

| scan                | combinations             | depth                   |
|---------------------|--------------------------|-------------------------|
| sequential          | L - 1                    | L - 1                   |
| hillis_steele       | L log2 L - L + 1         | log2 L                  |
| blelloch            | 3 L - log2 L - 3         | 2 log2 L                |
| chunked, c a chunk  | 2 L - c - L/c            | c + L/c - 1             |

for L a power of two; depth is the longest chain of combinations of which each needs the one before, which is the time
taken by a machine with a processor for every element. Each function counts its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.errors import DataError


@dataclass(frozen=True)
class Scan:
    """The result of a scan, and what it took.

    Attributes:
        h: (length, ...) after every step.
        combinations: how many pairs of steps were made one.
        depth: the longest chain of them.
    """

    h: Tensor
    combinations: int
    depth: int


def sequential(a: Tensor, b: Tensor) -> Scan:
    """One step after another, a and b (length, ...)."""
    _check(a, b)
    h = b[0]
    kept = [h]
    for t in range(1, len(b)):
        h = a[t] * h + b[t]
        kept.append(h)
    return Scan(torch.stack(kept), len(b) - 1, len(b) - 1)


def hillis_steele(a: Tensor, b: Tensor) -> Scan:
    """In round d every element takes in the one 2^d before it: few rounds, much work (Hillis and Steele 1986)."""
    _check(a, b)
    length, distance, work, depth = len(b), 1, 0, 0
    while distance < length:
        a_before, b_before = a[:-distance], b[:-distance]
        later_a, later_b = _combine((a_before, b_before), (a[distance:], b[distance:]))
        a, b = torch.cat([a[:distance], later_a]), torch.cat([b[:distance], later_b])
        work, depth, distance = work + length - distance, depth + 1, 2 * distance
    return Scan(b, work, depth)


def blelloch(a: Tensor, b: Tensor) -> Scan:
    """Up a tree of sums and down again: as little work as one after another, up to a factor (Blelloch 1990).

    Lengths that are no power of two are filled up with steps that change nothing.
    """
    _check(a, b)
    length = len(b)
    full = 1 << (length - 1).bit_length()
    a, b = (
        torch.cat([t, torch.full_like(t[:1], fill).expand(full - length, *t.shape[1:])]) for t, fill in ((a, 1), (b, 0))
    )
    levels, work, depth = [(a, b)], 0, 0
    while len(levels[-1][0]) > 1:
        a_now, b_now = levels[-1]
        levels.append(_combine((a_now[0::2], b_now[0::2]), (a_now[1::2], b_now[1::2])))
        work, depth = work + len(levels[-1][0]), depth + 1
    # What stands before each node of a level: nothing before the root.
    before = (torch.ones_like(levels[-1][0]), torch.zeros_like(levels[-1][1]))
    for a_now, b_now in levels[-2::-1]:
        right = _combine(before, (a_now[0::2], b_now[0::2]))
        before = tuple(torch.stack([l, r], dim=1).flatten(0, 1) for l, r in zip(before, right, strict=True))  # type: ignore[assignment]
        # Before the leftmost node of a level stands nothing: that is no combination.
        work, depth = work + len(right[0]) - 1, depth + (len(right[0]) > 1)
    _, h = _combine(before, (a, b))
    return Scan(h[:length], work + full - 1, depth + (full > 1))


def chunked(a: Tensor, b: Tensor, size: int = 64) -> Scan:
    """Chunks side by side, then their ends one after another, then each chunk from the end before it.

    This is what kernels do: the first and the last part keep many processors busy, and one number a chunk is kept.
    """
    _check(a, b)
    if size < 1:
        raise DataError(f"size must be at least 1, got {size}")
    length, chunks = len(b), -(-len(b) // size)
    fill = chunks * size - length
    a, b = (torch.cat([t, torch.full_like(t[:1], v).expand(fill, *t.shape[1:])]) for t, v in ((a, 1), (b, 0)))
    a, b = (t.unflatten(0, (chunks, size)) for t in (a, b))
    within_a, within_b = [a[:, 0]], [b[:, 0]]
    for t in range(1, size):
        now = _combine((within_a[-1], within_b[-1]), (a[:, t], b[:, t]))
        within_a.append(now[0])
        within_b.append(now[1])
    ends = sequential(within_a[-1], within_b[-1])
    before = torch.cat([torch.zeros_like(ends.h[:1]), ends.h[:-1]])  # (chunks, ...)
    h = torch.stack([A * before + B for A, B in zip(within_a, within_b, strict=True)], dim=1)
    # The end of a chunk is known from the second part, and the first chunk from the first.
    carried = (chunks - 1) * (size - 1)
    work = chunks * (size - 1) + ends.combinations + carried
    return Scan(h.flatten(0, 1)[:length], work, size - 1 + ends.depth + (carried > 0))


SCANS: Mapping[str, Callable[[Tensor, Tensor], Scan]] = {
    "sequential": sequential,
    "hillis_steele": hillis_steele,
    "blelloch": blelloch,
    "chunked": chunked,
}


def _combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps as one."""
    (a, b), (later_a, later_b) = first, second
    return later_a * a, later_a * b + later_b


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or b.dim() == 0 or len(b) == 0:
        raise DataError(f"a and b must be (length, ...) alike and not empty, got {tuple(a.shape)} and {tuple(b.shape)}")
