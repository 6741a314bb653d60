"""The state that a Mamba-3 scan carries, its inputs as the backends receive them, and how they spread over heads."""

from typing import NamedTuple

from torch import Tensor


class Mamba3State(NamedTuple):
    """What a Mamba-3 scan carries from one step to the next; float32 (float64 for float64) but for v."""

    angle: Tensor  # (sequences, heads, pairs), in [0, 2 pi]
    ssm: Tensor  # (sequences, heads, headdim, state), h of the last step
    k: Tensor  # (sequences, rank, heads, state), the last key, rotated
    v: Tensor  # (sequences, heads, headdim), the last x, in the dtype of y


class Mamba3Inputs(NamedTuple):
    """Inputs of the Mamba-3 scan; x, B, C, z share one dtype, the rest is float32 (float64 for float64)."""

    x: Tensor  # (batch, length, heads, headdim)
    dt: Tensor  # (batch, length, heads)
    A: Tensor  # (batch, length, heads)
    B: Tensor  # (batch, length, rank, groups, state)
    C: Tensor  # (batch, length, rank, groups, state)
    trap: Tensor  # (batch, length, heads)
    angles: Tensor  # (batch, length, heads or 1, pairs)
    D: Tensor | None  # (heads,)
    z: Tensor | None  # (batch, length, heads, headdim)
    dt_bias: Tensor | None  # (heads,)
    B_bias: Tensor | None  # (heads, rank, state)
    C_bias: Tensor | None  # (heads, rank, state)
    mimo_x: Tensor | None  # (heads, rank, headdim)
    mimo_z: Tensor | None  # (heads, rank, headdim)
    mimo_o: Tensor | None  # (heads, rank, headdim)
    initial_state: Mamba3State | None
    cu_seqlens: Tensor | None  # (sequences + 1,)
    dt_softplus: bool
    interleaved: bool


class RecurrenceInputs(NamedTuple):
    """Inputs of the operator `mambakit::mamba3_recurrence`, all in float32 or float64.

    s_t = exp(log_decay_t) s_{t-1} + scale_t v_t k_t^T,   y_t = (exp(log_decay_t) s_{t-1} + gamma_t v_t k_t^T) q_t
    """

    v: Tensor  # (batch, length, rank, heads, headdim)
    k: Tensor  # (batch, length, rank, heads, state)
    q: Tensor  # (batch, length, rank, heads, state)
    log_decay: Tensor  # (batch, length, heads), never positive
    scale: Tensor  # (batch, length, heads)
    gamma: Tensor  # (batch, length, heads)
    initial_state: Tensor  # (sequences, heads, headdim, state)
    cu_seqlens: Tensor | None  # (sequences + 1,)
    chunk_size: int


class WeightsInputs(NamedTuple):
    """Inputs of the operator `mambakit::mamba3_weights`, in any dtypes."""

    dt: Tensor  # (batch, length, heads)
    dt_bias: Tensor | None  # (heads,)
    A: Tensor  # (batch, length, heads)
    trap: Tensor  # (batch, length, heads)
    angles: Tensor  # (batch, length, heads or 1, pairs)
    ends: Tensor | None  # (batch * length,), whether a row is the last of its sequence
    softplus: bool


class WholeScanInputs(NamedTuple):
    """Inputs of the operator `mambakit::mamba3_scan`: x, B, C, z share one dtype, the rest is of that of sums.

    k, q = Rot(theta) (B + B_bias), Rot(theta) (C + C_bias), theta the sum of speeds * steps;   v = up x
    s_t = exp(log_decay_t) s_{t-1} + scale_t v_t k_t^T
    y_t = sum over ranks of down ((exp(log_decay_t) s_{t-1} + own_t v_t k_t^T) q_t + D v_t) silu(gate z_t)
    """

    x: Tensor  # (batch, length, heads, headdim)
    B: Tensor  # (batch, length, rank, groups, state)
    C: Tensor  # (batch, length, rank, groups, state)
    z: Tensor | None  # (batch, length, heads, headdim)
    log_decay: Tensor  # (batch, length, heads)
    scale: Tensor  # (batch, length, heads)
    own: Tensor  # (batch, length, heads)
    D: Tensor | None  # (heads, headdim)
    up: Tensor | None  # (heads, rank, headdim), as gate and down
    gate: Tensor | None
    down: Tensor | None
    B_bias: Tensor | None  # (heads, rank, state), as C_bias
    C_bias: Tensor | None
    speeds: Tensor | None  # (batch, length, heads or 1, pairs); None where nothing turns, as steps
    steps: Tensor | None  # (batch, length, heads)
    initial_angle: Tensor | None  # (sequences, heads, pairs)
    initial_state: Tensor | None  # (sequences, heads, headdim, state)
    cu_seqlens: Tensor | None  # (sequences + 1,)
    interleaved: bool
    chunk_size: int


def per_head(vectors: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """(..., rank, groups, state) for every head, its bias (heads, rank, state) added: (..., rank, heads, state)."""
    spread = vectors.repeat_interleave(heads // vectors.shape[-2], dim=-2)
    return spread if bias is None else spread + bias.transpose(0, 1)


def per_rank(x: Tensor, weight: Tensor | None, rank: int) -> Tensor:
    """(..., heads, headdim) for every rank, times the weight (heads, rank, headdim): (..., rank, heads, headdim)."""
    spread = x.unsqueeze(-3)
    return spread.expand(*x.shape[:-2], rank, *x.shape[-2:]) if weight is None else spread * weight.transpose(0, 1)


def outer(v: Tensor, k: Tensor) -> Tensor:
    """v k^T summed over the ranks, (sequences, heads, headdim, state), of (sequences, rank, heads, ...) each."""
    return (v[..., :, None] * k[..., None, :]).sum(1)
