"""Mamba-2 with one head over sequences of a few tokens, many models at once: what stands between the projections.

    x, B, C = silu(conv(x, B, C))  [+ or * themselves]
    y       = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    mixed   = norm(y silu(z))

`nn.Mamba2` runs these as operations for any length, whose scan is made for chunks of 16 to 64 tokens and keeps a state
for each, larger than eight tokens are. Here they are one kernel forward and one backward, which read and write what the
projections made and take, and no more. There is no state before and none after: this is for training and for judging
whole sequences (`lab.grouped`).
"""

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mambakit.lab.mixers import GatedMamba2, ResidualMamba2
from mambakit.nn import Mamba2
from mambakit.nn.mamba2 import Mamba2State
from mambakit.ops import triton

_KERNELS = triton.Kernels("short_mamba2")

_LONGEST = 10  # tokens; all pairs of them are written out
_PATHS: dict[type[nn.Module], int] = {Mamba2: 0, ResidualMamba2: 1, GatedMamba2: 2}
_PROGRAMS_FORWARD, _PROGRAMS_BACKWARD = 12, 8  # for each processor: as many warps as its registers hold
_PROCESSORS = 132


def without_states(model: nn.Module) -> nn.Module:
    """A copy of the model whose Mamba-2 mixers take short sequences as one kernel, and then return no state.

    What the kernel does not serve (longer sequences, several heads, a device without Triton) is done as before.
    """
    copied = copy.deepcopy(model)
    for mixer in copied.modules():
        if isinstance(mixer, Mamba2) and _has_one_kernel(mixer):
            mixer.forward = functools.partial(_forward, mixer)  # type: ignore[method-assign]
    return copied


def _forward(mixer: Mamba2, x: Tensor, state: Mamba2State | None = None, **options: Any) -> tuple[Tensor, Any]:
    whole = state is None and options.get("cu_seqlens") is None
    whole = whole and x.shape[1] <= _LONGEST and x.dtype == torch.float32
    if whole and x.is_cuda and triton.refusal(x.device) is None:
        return mixed(mixer, x), None
    return type(mixer).forward(mixer, x, state, **options)


def _has_one_kernel(mixer: Mamba2) -> bool:
    return (
        type(mixer) in _PATHS
        and mixer.heads == mixer.n_groups == 1
        and mixer.norm is not None
        and not mixer.norm.norm_before_gate
        and mixer.dt_limit == (0.0, math.inf)
        and mixer.in_proj.bias is None
        and mixer.conv1d.bias is not None
        and mixer.D.numel() == 1
        and all(size >= 32 and size & (size - 1) == 0 for size in (mixer.d_inner, mixer.d_state))
    )


def mixed(mixer: Mamba2, x: Tensor) -> Tensor:
    """The mixer's y (batch, length, d_model) of x (batch, length, d_model)."""
    rows = mixer.in_proj.weight
    projected = F.linear(x, F.pad(rows, (0, 0, 0, -rows.shape[0] % 4)))  # aligned rows
    assert mixer.norm is not None
    assert mixer.conv1d.bias is not None
    y = _Mix.apply(
        projected,
        mixer.conv1d.weight.squeeze(-2),
        mixer.conv1d.bias,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        mixer.norm.weight,
        mixer.norm.eps,
        _PATHS[type(mixer)],
    )
    return mixer.out_proj(y)


class _Mix(torch.autograd.Function):
    """(models, batch, length, d_inner) of projected (models, batch, length, width), or all without the models' axis."""

    @staticmethod
    def forward(projected: Tensor, *rest: Any) -> Tensor:
        if projected.dim() == 3:
            return _Mix.forward(*(t[None] if isinstance(t, Tensor) else t for t in (projected, *rest)))[0]
        tensors, (eps, path) = _contiguous(projected, *rest[:-2]), rest[-2:]
        models, batch, length, _ = projected.shape
        out = projected.new_empty(models, batch, length, rest[-3].shape[1])
        sizes = _sizes(tensors, path)
        programs = min(batch, max(1, _PROGRAMS_FORWARD * _PROCESSORS // models))
        _KERNELS.mix_forward[(programs, models)](*tensors, out, batch, eps, **sizes, num_warps=1)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-2])
        ctx.eps, ctx.path = inputs[-2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if d_out.dim() == 3:
            grads = _gradients([t[None] for t in saved], d_out[None], ctx.eps, ctx.path)
            return (*(grad[0] for grad in grads), None, None)
        return (*_gradients(saved, d_out, ctx.eps, ctx.path), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        moved = [
            arg
            if not isinstance(arg, Tensor)
            else arg.expand(info.batch_size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        return _Mix.apply(*moved), 0


def _gradients(saved: Any, d_out: Tensor, eps: float, path: int) -> list[Tensor]:
    tensors = _contiguous(*saved)
    projected, conv_weight, norm_weight = tensors[0], tensors[1], tensors[-1]
    models, batch = projected.shape[:2]
    convolved, taps = conv_weight.shape[1:]
    inner = norm_weight.shape[1]
    programs = min(batch, max(1, _PROGRAMS_BACKWARD * _PROCESSORS // models))
    shares = projected.new_empty(models, programs, 4 + inner + convolved * (1 + taps))
    d_projected = torch.empty_like(projected)
    sizes = _sizes(tensors, path)
    _KERNELS.mix_backward[(programs, models)](
        *tensors, d_out.contiguous(), d_projected, shares, batch, eps, **sizes, num_warps=1
    )
    numbers, d_norm, d_bias, d_taps = shares.sum(1).split([4, inner, convolved, convolved * taps], dim=1)
    d_dt_bias, d_A_log, d_D, _ = numbers.split(1, dim=1)
    d_weight = d_taps.view(models, taps, convolved).flip(1).transpose(1, 2)  # the token's own tap is the kernel's last
    return [d_projected, d_weight, d_bias, d_dt_bias, d_A_log, d_D, d_norm]


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _sizes(tensors: list[Tensor], path: int) -> dict[str, int]:
    projected, conv_weight, norm_weight = tensors[0], tensors[1], tensors[-1]
    inner = norm_weight.shape[1]
    return {
        "LENGTH": projected.shape[2],
        "INNER": inner,
        "STATE": (conv_weight.shape[1] - inner) // 2,
        "WIDTH": projected.shape[3],
        "TAPS": conv_weight.shape[2],
        "PATH": path,
    }
