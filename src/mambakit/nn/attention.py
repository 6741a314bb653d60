"""Causal self-attention with rotary positions: the mixer of hybrids and of the lab's comparisons.

    q, k, v = in_proj(x)
    y       = out_proj(softmax(rotate(q) rotate(k)^T / sqrt(head_dim)) v)       over the present and the past

Parameters have the names, shapes and order of mamba-ssm's `MHA`, the attention in the public hybrid checkpoints. The
rotation is RoFormer's (arXiv 2104.09864) on the pairs (i, i + rotary_dim / 2).
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mambakit import ops
from mambakit.nn.linear import Linear
from mambakit.ops.packing import check_packing, sequence_bounds

_PADDING = -1  # the position of an entry that pads


class AttentionState(NamedTuple):
    """What an attention mixer carries from one step to the next: it grows with the sequence."""

    keys: Tensor  # (batch, past, n_kv_heads, head_dim), rotated
    values: Tensor  # (batch, past, n_kv_heads, head_dim)
    positions: Tensor  # (batch, past) of the keys in their sequence; -1 for padding
    conv: tuple[Tensor, ...]  # the last inputs of the convolution, (batch, d_conv - 1, channels), if there is one

    def of_sequence(self, index: int) -> "AttentionState":
        """The state of one sequence of the batch or of the pack, without padding."""
        one, real = slice(index, index + 1), self.positions[index] != _PADDING
        cut = (self.keys[one, real], self.values[one, real], self.positions[one, real])
        return AttentionState(*cut, tuple(conv[one] for conv in self.conv))


class Attention(nn.Module):
    """Causal multi-head attention: `y, state = attention(x, state)`.

    Args:
        d_model: width of the input and output.
        n_heads: heads of the queries.
        n_kv_heads: heads of the keys and values, each shared by n_heads / n_kv_heads of the queries; None for n_heads.
        head_dim: channels of a head; None for d_model / n_heads.
        rotary_dim: channels of a head that are rotated by position, an even number; None for all, 0 for none.
        rotary_base: the slowest rotation takes about 2 pi * rotary_base steps to turn.
        d_conv: taps of a causal convolution over queries, keys and values; 0 for none.
        bias: whether the projections and the convolution have biases.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        d_conv: int = 0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and d_model % n_heads != 0:
            raise ValueError(f"n_heads must divide d_model = {d_model} unless head_dim is given, got {n_heads}")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        if n_heads % self.n_kv_heads != 0:
            raise ValueError(f"n_kv_heads must divide n_heads = {n_heads}, got {n_kv_heads}")
        self.head_dim = head_dim or d_model // n_heads
        self.rotary_dim, self.rotary_base = self.head_dim if rotary_dim is None else rotary_dim, rotary_base
        if self.rotary_dim % 2 != 0 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim = {self.head_dim}, got {self.rotary_dim}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = (n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.in_proj = Linear(d_model, channels, bias=bias, **made)
        self.conv1d = None
        if d_conv:
            self.conv1d = nn.Conv1d(
                channels,
                channels,
                d_conv,
                groups=channels,
                padding=d_conv - 1,
                bias=bias,
                **made,
            )
        self.out_proj = Linear(n_heads * self.head_dim, d_model, bias=bias, **made)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Mix (batch, length, d_model) along its length.

        Args:
            x: (batch, length, d_model).
            state: what an earlier call returned, to carry on from there; None starts afresh.
            cu_seqlens: (sequences + 1,) for packed sequences; batch is then 1 and states are per sequence.

        Returns:
            y (batch, length, d_model) and the state after the last step.
        """
        check_packing(x.shape[0], cu_seqlens)
        qkv = self.in_proj(x)
        conv: tuple[Tensor, ...] = ()
        if self.conv1d is not None:
            qkv, final = ops.causal_conv1d(
                qkv,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_state=None if state is None else state.conv[0],
                return_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            conv = (final,)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # (batch, length, n_heads + 2 n_kv_heads, head_dim)
        if cu_seqlens is None:
            y, after = self._attend(qkv, state)
        else:
            y, after = self._attend_each(qkv, state, cu_seqlens)
        return self.out_proj(y.flatten(-2)), after._replace(conv=conv)

    def step(self, x: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """One step: x and y are (batch, d_model)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def _attend(self, qkv: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        """y (batch, length, n_heads, head_dim) and the state, its `conv` left out."""
        q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
        if state is not None:
            positions = positions + (state.positions != _PADDING).sum(1, keepdim=True)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        mask, places = None, positions
        if state is not None:
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
            places = torch.cat([state.positions, positions], dim=1)  # of the keys, (batch, past + length)
            seen = (places[:, None] <= positions[:, :, None]) & (places != _PADDING)[:, None]
            mask = seen[:, None]  # (batch, 1, length, past + length)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=state is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return y.transpose(1, 2), AttentionState(k, v, places, ())

    def _attend_each(
        self, qkv: Tensor, state: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """`_attend` on each packed sequence, the states of shorter ones padded."""
        bounds = sequence_bounds(qkv.shape[0], qkv.shape[1], cu_seqlens)
        if len(bounds) == 1:  # a pack of no sequences
            y, after = self._attend(qkv, None)
            return y, AttentionState(after.keys[:0], after.values[:0], after.positions[:0], ())
        found = [
            self._attend(qkv[:, first:last], None if state is None else state.of_sequence(s))
            for s, (first, last) in enumerate(itertools.pairwise(bounds))
        ]
        y = torch.cat([y for y, _ in found], dim=1)
        keys = pad_sequence([after.keys[0] for _, after in found], batch_first=True)
        values = pad_sequence([after.values[0] for _, after in found], batch_first=True)
        positions = pad_sequence([after.positions[0] for _, after in found], batch_first=True, padding_value=_PADDING)
        return y, AttentionState(keys, values, positions, ())

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (batch, length, heads, head_dim) with its pairs of channels turned by the position's angles."""
        if self.rotary_dim == 0:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        powers = torch.arange(0, self.rotary_dim, 2, dtype=wide, device=x.device) / self.rotary_dim
        angle = positions[:, :, None, None] * self.rotary_base**-powers  # (batch, length, 1, rotary_dim / 2)
        cos, sin = angle.cos(), angle.sin()
        first, second, rest = x.split([self.rotary_dim // 2, self.rotary_dim // 2, x.shape[3] - self.rotary_dim], dim=3)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
        return torch.cat([turned.to(x.dtype), rest], dim=3)
