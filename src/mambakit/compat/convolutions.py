"""The functions of causal_conv1d, with its layout (batch, channels, length), its defaults and its return values."""

import torch
from torch import Tensor

from mambakit import ops
from mambakit.compat.refusal import NotServed, check_activation
from mambakit.compat.sequences import joined, runs_of, states_of_runs
from mambakit.errors import DataError


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps, looking back only.

    Args:
        x: (batch, channels, length).
        weight: (channels, width); bias: (channels,).
        seq_idx: (batch, length), the sequence of each position; a negative one is padding, where the output is 0.
        initial_states: (batch, channels, width - 1), the inputs before each row.
        return_final_states: also return the last width - 1 inputs, (batch, channels, width - 1).
        final_states_out: where to write them.
        activation: None, "silu" or "swish".

    Raises NotServed for another activation, and for final states together with seq_idx, as causal_conv1d does.
    """
    check_activation(activation)
    if final_states_out is not None and not return_final_states:
        raise NotServed("final_states_out is written only with return_final_states=True")
    batch, _, length = x.shape
    rows, before = x.transpose(1, 2), None if initial_states is None else initial_states.transpose(1, 2)
    if seq_idx is not None:
        if return_final_states:
            raise NotServed("final states of packed sequences: leave out return_final_states, or seq_idx")
        runs = runs_of(seq_idx, batch, length)
        y = ops.causal_conv1d(
            joined(rows),
            weight,
            bias,
            activation=activation,
            initial_state=states_of_runs(before, runs),
            cu_seqlens=runs.cu_seqlens,
        )
        assert isinstance(y, Tensor)
        y = y.view(batch, length, -1).masked_fill((seq_idx < 0)[..., None], 0.0)
        return as_laid_out(y, x)
    y, final = ops.causal_conv1d(
        rows, weight, bias, activation=activation, initial_state=before, return_final_state=True
    )
    out = as_laid_out(y, x)
    if not return_final_states:
        return out
    final = final.transpose(1, 2)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Take one step or more, and write what the next one needs into `conv_state`, in place.

    Args:
        x: (batch, channels) or (batch, channels, length).
        conv_state: (batch, channels, state_len), state_len >= width - 1, the latest inputs, the newest last.
        weight: (channels, width); bias: (channels,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) inputs seen before: conv_state is then a ring, and input i stands at i % state_len.
        conv_state_indices: (batch,) the row of conv_state of each row of x; a negative one is padding: its output
            is 0 and no state changes.

    Returns y in the shape and dtype of x.
    """
    check_activation(activation)
    inputs = x[..., None] if x.dim() == 2 else x
    taps, state_len = weight.shape[1] - 1, conv_state.shape[2]
    if state_len < taps:
        raise DataError(f"conv_state must hold width - 1 = {taps} inputs or more, got {state_len}")
    if conv_state_indices is not None:
        return _update_of_rows(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    before = _ordered(conv_state, cache_seqlens, taps)
    y, _ = ops.causal_conv1d(
        inputs.transpose(1, 2),
        weight,
        bias,
        activation=activation,
        initial_state=before.transpose(1, 2),
        return_final_state=True,
    )
    if cache_seqlens is None:
        # The new window is formed before it is written: both are views of one memory.
        conv_state.copy_(torch.cat([conv_state, inputs.to(conv_state.dtype)], dim=2)[..., -state_len:])
    else:
        _write_ring(conv_state, inputs, cache_seqlens)
    out = y.transpose(1, 2)
    return out[..., 0] if x.dim() == 2 else out


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each packed sequence, zeros before a short one's beginning.

    x is (total, channels), cu_seqlens (sequences + 1,); the result (sequences, channels, state_len).
    """
    ends = cu_seqlens[1:].long()
    positions = ends[:, None] + torch.arange(-state_len, 0, device=x.device)  # (sequences, state_len)
    inside = positions >= cu_seqlens[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros(ends.shape[0], x.shape[1], state_len)
    return (x[positions.clamp(min=0)] * inside[..., None].to(x.dtype)).transpose(1, 2)


def as_laid_out(y: Tensor, like: Tensor) -> Tensor:
    """y (batch, length, channels) as (batch, channels, length), in memory as `like` is and in its dtype."""
    out = y.transpose(1, 2).to(like.dtype)
    return out.contiguous() if like.stride(-1) == 1 and like.stride(1) != 1 else out


def _ordered(conv_state: Tensor, cache_seqlens: Tensor | None, taps: int) -> Tensor:
    """The last `taps` inputs in their order, (batch, channels, taps)."""
    if cache_seqlens is None:
        return conv_state[..., conv_state.shape[2] - taps :]
    places = cache_seqlens.long()[:, None] + torch.arange(-taps, 0, device=conv_state.device)
    return conv_state.gather(2, _spread(places % conv_state.shape[2], conv_state))


def _write_ring(conv_state: Tensor, inputs: Tensor, cache_seqlens: Tensor) -> None:
    state_len = conv_state.shape[2]
    kept = min(inputs.shape[2], state_len)  # earlier ones would be overwritten, in no certain order
    seen = cache_seqlens.long() + inputs.shape[2] - kept
    places = seen[:, None] + torch.arange(kept, device=inputs.device)
    newest = inputs[..., inputs.shape[2] - kept :].to(conv_state.dtype)
    conv_state.scatter_(2, _spread(places % state_len, conv_state), newest)


def _spread(places: Tensor, conv_state: Tensor) -> Tensor:
    return places[:, None].expand(-1, conv_state.shape[1], -1)


def _update_of_rows(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    rows: Tensor,
) -> Tensor:
    """`causal_conv1d_update` where row i of x has its state in row `rows[i]` of conv_state."""
    served = (rows >= 0).nonzero().flatten()
    own = rows[served].long()
    state = conv_state[own]
    seen = None if cache_seqlens is None else cache_seqlens[served]
    y = causal_conv1d_update(x[served], state, weight, bias, activation, seen)
    conv_state[own] = state
    return x.new_zeros(x.shape).index_copy(0, served, y)
