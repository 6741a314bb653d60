"""The mixers' forwards with a hook point after each of their parts: the layers' own joints, the gate left open.

`nn` fuses the softplus, D and the gate into the scan; here they stand alone, so that each can be seen and replaced.
Everything else is the layers' own code and operations. `states` and `mixing` cost more than the scan does, and are
computed where they are asked for alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import ops
from mambakit.lab.mechanisms.linear_form import LinearForm
from mambakit.lab.mechanisms.shown_scan import Call, Point, shown_scan
from mambakit.nn import Mamba, Mamba2, Mamba2State, Mamba3, Mamba3State, MambaState
from mambakit.ops.mamba3_inputs import outer, per_head, per_rank
from mambakit.ops.rotation import accumulate, rotate

ON_REQUEST = ("states", "mixing")
_AFTER = ("scan_output", "gated")


def points_of(mixer: nn.Module) -> tuple[str, ...]:
    """The hook points within `mixer`; none for a mixer that is shown from outside alone.

    A subclass has them as long as what is taken apart is still its own: the forward, or in Mamba-3 what follows the
    in-projection.
    """
    for known, joint in _JOINTS.items():
        if isinstance(mixer, known) and getattr(type(mixer), joint) is getattr(known, joint):
            convolved = ("convolved",) if hasattr(mixer, "convolve") else ()
            more = ("trap", "angles") if known is Mamba3 else ()
            return ("projected", *convolved, "z", "x", "B", "C", "delta", *more, "decay", *ON_REQUEST, *_AFTER)
    return ()


def attach(mixer: Any, at: Point) -> Callable[[], None]:
    """Put the hook points into a mixer that has them; returns what takes them out again."""
    joint = next(joint for known, joint in _JOINTS.items() if isinstance(mixer, known))
    replaced = {joint: _JOINED[joint](mixer, at)}
    handles = [mixer.in_proj.register_forward_hook(lambda module, arguments, y: at("projected", y))]
    if hasattr(mixer, "convolve"):
        replaced["convolve"] = _convolve(mixer.convolve, at)
    mixer.__dict__.update(replaced)

    def remove() -> None:
        for name in replaced:
            del mixer.__dict__[name]
        for handle in handles:
            handle.remove()

    return remove


def _convolve(own: Callable[..., tuple[Tensor, Any]], at: Point) -> Callable[..., tuple[Tensor, Any]]:
    def convolve(x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, after = own(x, state, cu_seqlens)
        return at("convolved", y), after

    return convolve


def _forward(mixer: Any, at: Point) -> Callable[..., tuple[Tensor, Any]]:
    run = _mamba if isinstance(mixer, Mamba) else _mamba2

    def forward(x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        return run(mixer, x, state, cu_seqlens, at)

    return forward


def _mix(mixer: Any, at: Point) -> Callable[..., tuple[Tensor, Any]]:
    def mix(projected: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return _mamba3(mixer, projected, state, cu_seqlens, at)

    return mix


# What stands in for what: all of the first two, of Mamba-3 what follows the in-projection.
_JOINTS: dict[type[nn.Module], str] = {Mamba: "forward", Mamba2: "forward", Mamba3: "mix"}
_JOINED: dict[str, Callable[[Any, Point], Callable[..., tuple[Tensor, Any]]]] = {"forward": _forward, "mix": _mix}


def gate(mixer: Any, y: Tensor, z: Tensor) -> Tensor:
    """y, the output of the scan with D, past gate and norm: (batch, length, d_inner), what out_proj takes."""
    if isinstance(mixer, Mamba):
        return y * F.silu(z)
    if isinstance(mixer, Mamba2):
        y = y.flatten(-2)
        return y * F.silu(z) if mixer.norm is None else mixer.norm(y, z)
    ranks = mixer.mimo_rank > 1
    if mixer.norm is not None:
        return mixer.gated_norm(mixer.norm, y, z).flatten(-2)
    if not ranks:
        return (y * F.silu(z)).flatten(-2)
    opened = y * F.silu(z.unsqueeze(2) * mixer.mimo_z.transpose(0, 1))  # (batch, length, rank, heads, headdim)
    return (opened * mixer.mimo_o.transpose(0, 1)).sum(2).to(z.dtype).flatten(-2)


def gate_factors(mixer: Any, y: Tensor, z: Tensor) -> Tensor:
    """What `gate` multiplies every entry of y by, its norm frozen at the scale that y gives it: the shape of y.

    Summed over the ranks, y times these is `gate(mixer, y, z)`.
    """
    if isinstance(mixer, Mamba):
        return F.silu(z)
    ranks = isinstance(mixer, Mamba3) and mixer.mimo_rank > 1
    opening = F.silu(z.unsqueeze(2) * mixer.mimo_z.transpose(0, 1)) if ranks else F.silu(z).view_as(y)
    if mixer.norm is not None:
        normed = (y if mixer.norm.norm_before_gate else y * opening).flatten(-2).unflatten(-1, (mixer.norm.groups, -1))
        scale = torch.rsqrt(normed.square().mean(-1, keepdim=True) + mixer.norm.eps).expand_as(normed)
        opening = opening * (scale.flatten(-2) * mixer.norm.weight).view_as(y)
    return opening * mixer.mimo_o.transpose(0, 1) if ranks else opening


def skip(mixer: Any, x: Tensor) -> Tensor:
    """D times the values, in the shape of the scan's output."""
    if isinstance(mixer, Mamba):
        return mixer.D * x
    if isinstance(mixer, Mamba2):
        D = mixer.skip
        return (D[:, None] if D.dim() == 1 else D) * x
    return mixer.D[:, None] * values(mixer, x)


def values(mixer: Any, x: Tensor) -> Tensor:
    """What the mixing matrix multiplies, x or under MIMO one vector a rank: in the shape of the scan's output."""
    if isinstance(mixer, Mamba3) and mixer.mimo_rank > 1:
        return per_rank(x, mixer.mimo_x, mixer.mimo_rank)
    return x


def _mamba(
    mixer: Mamba, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None, at: Point
) -> tuple[Tensor, MambaState]:
    conv, before = (None, None) if state is None else state
    u, z = mixer.split(mixer.in_proj(x))
    u, conv = mixer.convolve(u, conv, cu_seqlens)
    z = at("z", z)
    delta, B, C = mixer.select(u)
    u, B, C = at("x", u), at("B", B), at("C", C)
    A = -torch.exp(mixer.A_log)
    delta = at("delta", F.softplus(_wide(delta) + mixer.dt_proj.bias))  # (batch, length, d_inner)

    scanned, ssm = ops.selective_scan(
        u, delta, A, B, C, initial_state=before, return_final_state=True, cu_seqlens=cu_seqlens
    )

    def form(decay: Tensor, log_decay: Tensor) -> LinearForm:
        v = _wide(u)[:, :, None, :, None]  # every channel a head of one
        k, q = (_wide(t)[:, :, None, None] for t in (B, C))
        return LinearForm(v, k, q, decay, log_decay, delta, before=None if before is None else before[:, :, None])

    call = Call(packed=cu_seqlens is not None, continued=state is not None)
    scanned, ssm = shown_scan(at, (scanned, ssm), form, lambda: delta[..., None] * A, call)
    y = at("scan_output", scanned.to(u.dtype) + skip(mixer, u).to(u.dtype))
    y = at("gated", gate(mixer, y, z))
    return mixer.out_proj(y), MambaState(conv, ssm)


def _mamba2(
    mixer: Mamba2, x: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None, at: Point
) -> tuple[Tensor, Mamba2State]:
    conv, before = (None, None) if state is None else state
    z, xBC, dt = mixer.split(mixer.in_proj(x))
    xBC, conv = mixer.convolve(xBC, conv, cu_seqlens)
    z = at("z", z)
    u, B, C = mixer.select(xBC)
    u, B, C = at("x", u), at("B", B), at("C", C)
    A = -torch.exp(mixer.A_log)
    delta = at("delta", F.softplus(_wide(dt) + mixer.dt_bias).clamp(*mixer.dt_limit))  # (batch, length, heads)

    scanned, ssm = ops.ssd(
        u,
        delta,
        A,
        B,
        C,
        chunk_size=mixer.chunk_size,
        initial_state=before,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )

    def form(decay: Tensor, log_decay: Tensor) -> LinearForm:
        k, q = (_wide(t).repeat_interleave(mixer.heads // mixer.n_groups, dim=2)[:, :, None] for t in (B, C))
        return LinearForm(_wide(u)[:, :, None], k, q, decay[..., None], log_decay[..., None], delta, before=before)

    call = Call(packed=cu_seqlens is not None, continued=state is not None)
    scanned, ssm = shown_scan(at, (scanned, ssm), form, lambda: delta * A, call)
    y = at("scan_output", scanned.to(u.dtype) + skip(mixer, u).to(u.dtype))
    y = at("gated", gate(mixer, y, z))
    return mixer.out_proj(y), Mamba2State(conv, ssm)


def _mamba3(
    mixer: Mamba3, projected: Tensor, state: Mamba3State | None, cu_seqlens: Tensor | None, at: Point
) -> tuple[Tensor, Mamba3State]:
    z, u, B, C, dt, A, trap, angles = mixer.split(projected)
    z, u, B, C = at("z", z), at("x", u), at("B", B), at("C", C)
    delta = at("delta", F.softplus(_wide(dt) + mixer.dt_bias))  # (batch, length, heads)
    trap, angles = at("trap", _wide(trap)), at("angles", _wide(angles))
    ranks, interleaved = mixer.mimo_rank, mixer.mimo_rank == 1

    scanned, after = ops.mamba3_scan(
        u,
        delta,
        A,
        B,
        C,
        trap,
        angles,
        B_bias=mixer.B_bias,
        C_bias=mixer.C_bias,
        mimo_x=mixer.mimo_x,
        interleaved=interleaved,
        chunk_size=mixer.chunk_size,
        initial_state=state,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )

    def form(decay: Tensor, log_decay: Tensor) -> LinearForm:
        turns = math.pi * torch.tanh(angles)[:, :, None] * delta[..., None]  # (batch, length, heads, pairs)
        angle, _ = accumulate(turns, turns[:, 0] * 0 if state is None else state.angle, None)
        k, q = (
            rotate(per_head(t if ranks > 1 else t[:, :, None], bias, mixer.heads), angle[:, :, None], interleaved)
            for t, bias in ((_wide(B), mixer.B_bias), (_wide(C), mixer.C_bias))
        )  # (batch, length, rank, heads, state)
        own = torch.sigmoid(trap)
        written = None if state is None else outer(per_rank(_wide(state.v), mixer.mimo_x, ranks), state.k)
        return LinearForm(
            per_rank(_wide(u), mixer.mimo_x, ranks),
            k,
            q,
            decay[..., None],
            log_decay[..., None],
            own * delta,
            (1 - own) * delta,
            None if state is None else state.ssm,
            written,
        )

    call = Call(packed=cu_seqlens is not None, continued=state is not None)
    scanned, ssm = shown_scan(at, (scanned, after.ssm), form, lambda: delta * A, call)
    y = at("scan_output", scanned.to(u.dtype) + skip(mixer, u).to(u.dtype))
    y = at("gated", gate(mixer, y, z))
    return mixer.out_proj(y), after._replace(ssm=ssm)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
