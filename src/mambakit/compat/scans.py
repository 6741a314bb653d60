"""The scans of mamba_ssm, with its layouts, defaults and return values.

Mamba-1's have the length last, (batch, dim, length); Mamba-2's are (batch, length, heads, headdim), as here. What is
about speed and memory alone (`chunk_size`, `checkpoint_lvl`) is checked and leaves the result as it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import ops
from mambakit.compat.convolutions import as_laid_out, causal_conv1d_fn
from mambakit.compat.refusal import NotServed, check_activation
from mambakit.compat.sequences import Runs, joined, runs_of, states_of_runs
from mambakit.errors import DataError


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-1.

    Args:
        u, delta, z: (batch, dim, length).
        A: (dim, state), real.
        B, C: (dim, state), (batch, state, length) or (batch, groups, state, length).
        D, delta_bias: (dim,).
        delta_softplus: pass delta (its bias added) through softplus.
        return_last_state: also return the state after the last step, (batch, dim, state), in float32. Its gradient
            counts, which mamba_ssm's does not.

    Returns y (batch, dim, length) in the dtype of u. Raises NotServed for a complex A.
    """
    return _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by the definition, one step after another."""
    return _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend="reference")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba-1 mixer from the output of its in-projection, xz (batch, 2 dim, length), to that of its out-projection.

    conv1d_weight is (dim, 1, width); B and C, where given, don't depend on the input (or have the shapes of
    `selective_scan_fn`). b_rms_weight and c_rms_weight (state,) are of RMS norms on B and C, and dt_rms_weight (dim,)
    of one on delta, after its projection. `checkpoint_lvl`, 0 or 1, is about memory alone.

    Returns (batch, length, d_model).
    """
    if checkpoint_lvl not in (0, 1):
        raise NotServed(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (batch, length, dim) each
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    assert isinstance(u, Tensor)
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    projected = F.linear(u, x_proj_weight)
    dt, rest = projected[..., :rank], projected[..., rank:]
    if B is None:
        B = rest[..., :state].transpose(1, 2)
        B = B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)[:, None]
    elif B_proj_bias is not None:
        raise NotServed("B_proj_bias is for a B made of the input: leave B out, or add the bias to it")
    if C is None:
        C = projected[..., -state:].transpose(1, 2)
        C = C if C_proj_bias is None else C + C_proj_bias.to(C.dtype)[:, None]
    elif C_proj_bias is not None:
        raise NotServed("C_proj_bias is for a C made of the input: leave C out, or add the bias to it")
    if b_rms_weight is not None:
        B = ops.rms_norm(B.transpose(-1, -2), b_rms_weight, eps=b_c_dt_rms_eps).transpose(-1, -2)
    if c_rms_weight is not None:
        C = ops.rms_norm(C.transpose(-1, -2), c_rms_weight, eps=b_c_dt_rms_eps).transpose(-1, -2)
    delta = F.linear(dt, delta_proj_weight)
    if dt_rms_weight is not None:
        delta = ops.rms_norm(delta, dt_rms_weight, eps=b_c_dt_rms_eps)
    y = selective_scan_fn(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        z.transpose(1, 2),
        delta_bias,
        delta_softplus=delta_softplus,
    )
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of Mamba-1's or Mamba-2's scan; `state` is updated in place.

    Args:
        state: (batch, dim, d_state) or (batch, heads, dim, d_state).
        x, dt, z: (batch, dim) or (batch, heads, dim).
        A: (dim, d_state) or (heads, dim, d_state).
        B, C: (batch, d_state) or (batch, groups, d_state).
        D, dt_bias: (dim,) or (heads, dim).
        state_batch_indices: (batch,) the row of `state` of each row of x.

    Returns y in the shape and dtype of x.
    """
    if state_batch_indices is not None:
        rows = state_batch_indices.long()
        own = state[rows]
        y = selective_state_update(own, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state[rows] = own
        return y
    B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
    if state.dim() == 4:
        x, dt = (t[:, None] if t.dim() == 2 else t for t in (x, dt))
        z = z[:, None] if z is not None and z.dim() == 2 else z
        A = A[None] if A.dim() == 2 else A
        D, dt_bias = (t[None] if t is not None and t.dim() == 1 else t for t in (D, dt_bias))
    if state.dim() == 4 and _one_number_a_head(A, dt, dt_bias):
        y, final = ops.ssd_step(
            state,
            x,
            dt[..., 0],
            A[:, 0, 0],
            B,
            C,
            D,
            z,
            None if dt_bias is None else dt_bias[:, 0],
            dt_softplus=dt_softplus,
        )
    else:
        y, final = ops.selective_scan_step(
            state.flatten(1, -2),
            x.flatten(1),
            dt.flatten(1),
            A.flatten(0, -2),
            B,
            C,
            None if D is None else D.flatten(),
            None if z is None else z.flatten(1),
            None if dt_bias is None else dt_bias.flatten(),
            delta_softplus=dt_softplus,
        )
    state.copy_(final.view(state.shape))
    return y.view(x.shape).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The scan of Mamba-2.

    Args:
        x, z: (batch, length, heads, headdim); dt: (batch, length, heads).
        A, dt_bias: (heads,); D: (heads,) or (heads, headdim).
        B, C: (batch, length, groups, state).
        chunk_size: about speed alone; a positive number.
        initial_states: (batch, heads, headdim, state). Under seq_idx they are those of sequence 0.
        seq_idx: (batch, length), the sequence of each position.
        cu_seqlens: (sequences + 1,) for a batch of one: the bounds of its sequences, which they keep apart (in
            mamba_ssm seq_idx alone does). Where both are given they must agree.
        return_final_states: also return the state at the end of each row, in float32.
        return_varlen_states: also return the state at the end of each sequence of cu_seqlens.

    Returns y (batch, length, heads, headdim) in the dtype of x, then the states asked for, in the order above.
    """
    if chunk_size < 1:
        raise DataError(f"chunk_size must be at least 1, got {chunk_size}")
    if return_varlen_states and cu_seqlens is None:
        raise DataError("return_varlen_states needs cu_seqlens, the bounds of the sequences")
    options: dict[str, object] = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_state": True}
    batch, length = x.shape[:2]
    if seq_idx is None and cu_seqlens is None:
        y, final = ops.ssd(x, dt, A, B, C, D, z, dt_bias, initial_state=initial_states, **options)  # type: ignore[arg-type]
        return (y.to(x.dtype), final) if return_final_states else y.to(x.dtype)
    runs = None if seq_idx is None else runs_of(seq_idx, batch, length)
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, runs, batch)
    rows = (joined(x), joined(dt), A, joined(B), joined(C), D, None if z is None else joined(z), dt_bias)
    bounds, before = _starts(initial_states, cu_seqlens, runs)
    y, states = ops.ssd(*rows, initial_state=before, cu_seqlens=bounds, **options)  # type: ignore[arg-type]
    results = [y.view(x.shape).to(x.dtype)]
    if return_final_states:
        results.append(states[-1:] if runs is None or cu_seqlens is not None else states[runs.last])
    if return_varlen_states:
        results.append(states)
    return tuple(results) if len(results) > 1 else results[0]


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer from the output of its in-projection to that of its out-projection.

    Args:
        zxbcdt: (batch, length, 2 mlp + 2 dim + 2 ngroups state + heads), dim = heads * headdim; `mlp` channels, where
            there are more than the scan has use for, pass through a gate beside it.
        conv1d_weight: (dim + 2 ngroups state, width); conv1d_bias: (dim + 2 ngroups state,).
        dt_bias, A: (heads,); D: (heads,), and headdim is then needed, or (heads, headdim).
        rmsnorm_weight: (dim,), of the gated norm; without it the gate alone.
        outproj_weight: (out, mlp + dim); outproj_bias: (out,).
        The rest is as in `mamba_chunk_scan_combined`; dt passes through softplus.

    Returns (batch, length, out), or (batch, length, mlp + dim) without a projection; with `return_final_states` also
    the states (batch, heads, headdim, state).
    """
    check_activation(activation)
    if D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise DataError("headdim is needed where D has one number a head")
    if outproj_weight is None and outproj_bias is not None:
        raise DataError("outproj_bias needs outproj_weight")
    heads = D.shape[0]
    dim = heads * headdim
    shared = (conv1d_weight.shape[0] - dim) // 2  # ngroups * state
    mlp = (zxbcdt.shape[-1] - 2 * dim - 2 * shared - heads) // 2
    if mlp < 0 or 2 * mlp + 2 * dim + 2 * shared + heads != zxbcdt.shape[-1]:
        raise DataError(f"the width {zxbcdt.shape[-1]} of zxbcdt does not go with {heads} heads of {headdim}")
    gate, passed, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, dim + 2 * shared, heads], dim=-1)
    convolved = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(convolved, Tensor)
    x, B, C = convolved.transpose(1, 2).split([dim, shared, shared], dim=-1)
    result = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y, final = result[0].flatten(-2), result[1]
    if rmsnorm_weight is not None:
        y = ops.gated_rms_norm(y, rmsnorm_weight, z, eps=rmsnorm_eps, groups=ngroups, norm_before_gate=norm_before_gate)
    if mlp > 0:
        y = torch.cat([F.silu(gate) * passed, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if A.is_complex():
        raise NotServed("a complex A: the scans here have real states; write it as a real A of twice the size")
    batch, _, length = u.shape
    B, C = (_by_position(t, batch, length) for t in (B, C))
    groups = math.lcm(B.shape[2], C.shape[2])
    B, C = (t if t.shape[2] == groups else t.repeat_interleave(groups // t.shape[2], dim=2) for t in (B, C))
    y, state = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus=delta_softplus,
        return_final_state=True,
        backend=backend,
    )
    y = as_laid_out(y, u)
    return (y, state) if return_last_state else y


def _by_position(B: Tensor, batch: int, length: int) -> Tensor:
    """B or C as (batch, length, groups, state)."""
    if B.dim() == 2:  # (dim, state), one for all positions: a group for every channel
        return B.expand(batch, length, *B.shape)
    if B.dim() == 3:
        return B.transpose(1, 2)[:, :, None]
    return B.permute(0, 3, 1, 2)


def _one_number_a_head(A: Tensor, dt: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether rate and step are one number a head, expanded: what Mamba-2 has."""
    tied = A.stride(-1) == 0 and A.stride(-2) == 0 and dt.stride(-1) == 0
    return tied and (dt_bias is None or dt_bias.stride(-1) == 0)


def _check_bounds(cu_seqlens: Tensor, runs: Runs | None, batch: int) -> None:
    if batch != 1:
        raise DataError(f"cu_seqlens needs a batch of 1, got {batch}: lay the sequences end to end")
    if runs is not None and not torch.equal(cu_seqlens.unique().long(), runs.cu_seqlens):
        raise DataError("cu_seqlens and seq_idx disagree on where the sequences begin; give one of them")


def _starts(
    initial_states: Tensor | None, cu_seqlens: Tensor | None, runs: Runs | None
) -> tuple[Tensor | None, Tensor | None]:
    """The bounds of the sequences, and the states that they start from."""
    if cu_seqlens is not None:
        if initial_states is not None:
            raise NotServed("initial_states with cu_seqlens: give seq_idx, whose sequence 0 they belong to")
        return cu_seqlens, None
    assert runs is not None
    return runs.cu_seqlens, states_of_runs(initial_states, runs, carries=runs.numbers[runs.first] == 0)
