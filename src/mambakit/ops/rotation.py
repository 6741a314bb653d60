"""The rotations of Mamba-3: B and C turned by an angle that adds up along the sequence (arXiv 2603.15569).

    theta_t = theta_{t-1} + turn_t,   k_t = Rot(theta_t) B_t,   q_t = Rot(theta_t) C_t

so that q_t . k_s depends on the turns between s and t alone. Rot turns pairs of coordinates; those without an angle
stay as they are.
"""

import math

import torch
from torch import Tensor


def rotate(vectors: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of coordinates of `vectors` (..., state) by `angle` (..., pairs), pairs at most state / 2.

    Pair i is the coordinates (2i, 2i + 1) when `interleaved`, else (i, i + state / 2).
    """
    pairs, cos, sin = angle.shape[-1], torch.cos(angle), torch.sin(angle)
    if interleaved:
        first, second = vectors[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)  # (..., pairs)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)  # (..., pairs, 2)
        return torch.cat([turned.flatten(-2), vectors[..., 2 * pairs :]], dim=-1)
    low, high = vectors.chunk(2, dim=-1)  # (..., state / 2)
    first, second = low[..., :pairs], high[..., :pairs]
    return torch.cat(
        [first * cos - second * sin, low[..., pairs:], first * sin + second * cos, high[..., pairs:]], dim=-1
    )


def accumulate(turn: Tensor, initial: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The angle after every step and after the last one, in [0, 2 pi], from `initial` and the turn of each step.

    Args:
        turn: (batch, length, heads, pairs).
        initial: (sequences, heads, pairs), the angle before each sequence.
        cu_seqlens: (sequences + 1,) for packed sequences.

    Returns:
        (batch, length, heads, pairs) and (sequences, heads, pairs), in the dtype of `turn`.
    """
    # A million turns of one radian sum to 1e6, where neighbouring float32 numbers are 0.06 rad apart. MPS has no
    # float64.
    wide = torch.float32 if turn.device.type == "mps" else torch.float64
    batch, _, heads, pairs = turn.shape
    zero = torch.zeros(batch, 1, heads, pairs, dtype=wide, device=turn.device)
    total = torch.cat([zero, turn.cumsum(1, dtype=wide)], dim=1)  # (batch, length + 1, heads, pairs)
    if cu_seqlens is None:
        angle, last = total[:, 1:] + initial[:, None], total[:, -1] + initial
    else:
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        offset = initial - total[0, starts]  # (sequences, heads, pairs)
        rows = torch.arange(turn.shape[1], dtype=ends.dtype, device=turn.device)
        sequence = torch.searchsorted(ends, rows, right=True)  # (length,)
        angle, last = total[:, 1:] + offset[sequence], total[0, ends] + offset
    return wrapped(angle).to(turn.dtype), wrapped(last).to(turn.dtype)


def wrapped(angle: Tensor) -> Tensor:
    """`angle` in [0, 2 pi], whole turns taken off."""
    return torch.remainder(angle, 2 * math.pi)
