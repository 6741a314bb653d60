"""Stacks of Mamba-2 with one head over sequences of a few tokens, many models at once, for training on a GPU.

    n       = hidden / rms(hidden)
    z, x, B, C, dt = (in_proj norm) n
    x, B, C = silu(conv(x, B, C))  [+ or * themselves]
    y       = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    hidden += out_proj norm(y silu(z))

`nn.Mamba2` runs these as operations for any length, whose scan is made for chunks of 16 to 64 tokens and keeps a state
for each, larger than eight tokens are. Here what stands between the projections is one kernel forward and two backward,
which read and write what the projections made and take, and no more. The norm's weight goes into the in-projection, and
the gradients of the projections are summed in parts, so that a few narrow matrices fill a GPU.

There is no state before and none after: this is for training and for judging whole sequences (`lab.grouped`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mambakit.lab.mixers import GatedMamba2, ResidualMamba2
from mambakit.lab.models import MambaForComposite, MambaPosEncoding, sinusoids
from mambakit.nn import Mamba2
from mambakit.ops import triton

_OF_MIX = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
_KERNELS = triton.Kernels("short_mamba2")
_LONGEST = 10  # tokens; all pairs of them are written out
_PATHS: dict[type[nn.Module], int] = {Mamba2: 0, ResidualMamba2: 1, GatedMamba2: 2}
_PROCESSORS = 132
_PROGRAMS = 12  # of one warp for each processor, as many as its registers hold at once
_KEYS = 64  # of a program of the backward
_PARTS = 16  # that a weight's gradient is summed in


def serves(model: nn.Module, tokens: Tensor) -> bool:
    """Whether `logits` gives what `model` gives for such tokens, on their device."""
    return (
        isinstance(model, MambaForComposite)
        and tokens.shape[-1] <= _LONGEST
        and tokens.is_cuda
        and triton.refusal(tokens.device) is None
        and has_kernels(model)
    )


def has_kernels(model: MambaForComposite) -> bool:
    """Whether the model is of the kind and the widths that the kernels are made for."""
    width = model.embedding.embedding_dim
    return (
        model.embedding.weight.dtype == torch.float32
        and _is_power(width, 16)
        and all(layer.mlp is None and _mixer_has_kernels(layer.mixer) for layer in model.backbone.layers)
    )


def logits(model: MambaForComposite, parameters: Mapping[str, Tensor], tokens: Tensor, answers: int) -> Tensor:
    """(models, batch, answers, vocabulary) for tokens (models, batch, length), as models of `model`'s shape give them.

    Args:
        parameters: by `model`'s names, (models, ...) each.
        answers: tokens at the end for which logits are wanted.
    """
    models, batch, length = tokens.shape
    table = parameters["embedding.weight"]
    first_row = torch.arange(models, device=tokens.device)[:, None, None] * table.shape[1]
    hidden = F.embedding(tokens + first_row, table.flatten(0, 1))  # (models, batch, length, d_model)
    if isinstance(model, MambaPosEncoding):
        if model.position is None:
            places = torch.arange(length, device=tokens.device)
            hidden = hidden + sinusoids(places, hidden.shape[-1]).to(hidden.dtype)
        else:
            hidden = hidden + parameters["position.weight"][:, None, :length]
    for index, layer in enumerate(model.backbone.layers):
        prefix = f"backbone.layers.{index}."
        own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        hidden = _block(layer, own, hidden)
    last = hidden[:, :, -answers:].reshape(models, batch * answers, -1)
    last = (
        F.rms_norm(last, last.shape[-1:], eps=model.backbone.norm_f.eps) * parameters["backbone.norm_f.weight"][:, None]
    )
    head = parameters.get("head.weight", table)  # one matrix where they are tied
    return _Linear.apply(last, head).view(models, batch, answers, -1)


def _block(layer: Any, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """hidden (models, batch, length, d_model) after a block."""
    mixer, shape = layer.mixer, hidden.shape
    rows = hidden.flatten(1, 2)
    weight = parameters["mixer.in_proj.weight"] * parameters["norm.weight"][:, None]
    weight = F.pad(weight, (0, 0, 0, -weight.shape[1] % 8))  # rows of whole sectors
    projected = _Linear.apply(_Normalised.apply(rows, layer.norm.eps), weight)
    y = _Mix.apply(
        projected.view(*shape[:3], -1),
        *(parameters[f"mixer.{name}"] for name in _OF_MIX),
        mixer.norm.eps,
        _PATHS[type(mixer)],
    )
    return (rows + _Linear.apply(y.flatten(1, 2), parameters["mixer.out_proj.weight"])).view(shape)


def _mixer_has_kernels(mixer: nn.Module) -> bool:
    return (
        isinstance(mixer, Mamba2)
        and type(mixer) in _PATHS
        and mixer.heads == mixer.n_groups == 1
        and mixer.norm is not None
        and not mixer.norm.norm_before_gate
        and mixer.dt_limit == (0.0, math.inf)
        and mixer.in_proj.bias is None
        and mixer.conv1d.bias is not None
        and mixer.D.numel() == 1
        and _is_power(mixer.d_inner, 32)
        and _is_power(mixer.d_state, 32)
    )


def _is_power(size: int, least: int) -> bool:
    """Whether it is a power of two."""
    return size >= least and size & (size - 1) == 0


class _Linear(torch.autograd.Function):
    """x W^T (models, rows, out) of x (models, rows, in) and W (models, out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.contiguous()  # and so aligned: it may be a part of a larger tensor
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        models, rows, _ = x.shape
        parts = math.gcd(rows, _PARTS)
        of_parts = (tensor.reshape(models * parts, rows // parts, -1) for tensor in (grad, x))
        shares = torch.bmm(next(of_parts).mT, next(of_parts))
        return torch.bmm(grad, weight), shares.view(models, parts, *weight.shape[1:]).sum(1)


class _Normalised(torch.autograd.Function):
    """The rows of x (models, rows, d_model) over the roots of their mean squares."""

    _TILE = 64

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        y, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
        grid = (-(-rows // _Normalised._TILE),)
        _KERNELS.normalise[grid](x, y, rows, eps, COLUMNS=x.shape[2], TILE=_Normalised._TILE)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_x, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
        grid = (-(-rows // _Normalised._TILE),)
        _KERNELS.normalise_backward[grid](
            x, grad.contiguous(), grad_x, rows, ctx.eps, COLUMNS=x.shape[2], TILE=_Normalised._TILE
        )
        return grad_x, None


class _Mix(torch.autograd.Function):
    """(models, batch, length, d_inner) of projected (models, batch, length, width) and parameters (models, ...)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        projected, *parameters = args[:-2]
        tensors, (eps, path) = [projected.contiguous(), *map(_of_models, parameters)], args[-2:]
        models, batch, length, _ = projected.shape
        out = projected.new_empty(models, batch, length, tensors[-1].shape[1])
        products = projected.new_empty(models, batch, length, length)
        ctx.strides = [tensor.stride(0) for tensor in tensors[1:]]
        ctx.eps, ctx.sizes = eps, _sizes(tensors, path)
        _KERNELS.mix_forward[_grid(models, batch)](
            *tensors, out, products, batch, *ctx.strides, eps, **ctx.sizes, num_warps=1
        )
        ctx.save_for_backward(*tensors, products)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, products = ctx.saved_tensors
        projected, conv_weight, conv_bias, *_, norm_weight = tensors
        models, batch = projected.shape[:2]
        inner, channels, taps = norm_weight.shape[1], conv_bias.shape[1], conv_weight.shape[3]
        grid, keys = _grid(models, batch), min(_KEYS, ctx.sizes["STATE"])
        shares = projected.new_empty(models, grid[0], 4 + inner + channels * (1 + taps))
        d_projected, d_products = torch.empty_like(projected), torch.empty_like(products)
        _KERNELS.mix_backward_values[grid](
            *tensors, products, d_out.contiguous(), d_projected, d_products, shares, batch, *ctx.strides, ctx.eps,
            **ctx.sizes, num_warps=1,
        )  # fmt: skip
        _KERNELS.mix_backward_keys[*grid, ctx.sizes["STATE"] // keys](
            projected, conv_weight, conv_bias, d_products, d_projected, shares, batch, *ctx.strides[:2],
            **ctx.sizes, KEYS=keys, num_warps=1,
        )  # fmt: skip
        sums = shares.sum(1).split([1, 1, 1, 1, inner, channels, channels * taps], dim=1)
        d_dt_bias, d_A_log, d_D, _, d_norm, d_bias, d_weight = sums
        return d_projected, d_weight.view_as(conv_weight), d_bias, d_dt_bias, d_A_log, d_D, d_norm, None, None


def _of_models(parameter: Tensor) -> Tensor:
    """The parameter, with each model's own in one piece; models may lie apart."""
    return parameter if parameter[0].is_contiguous() else parameter.contiguous()


def _grid(models: int, batch: int) -> tuple[int, int]:
    """Programs for each model, of as many sequences each as any other, up to one."""
    most = max(1, _PROGRAMS * _PROCESSORS // models)
    return -(-batch // -(-batch // most)), models


def _sizes(tensors: list[Tensor], path: int) -> dict[str, int]:
    projected, conv_weight, norm_weight = tensors[0], tensors[1], tensors[-1]
    inner = norm_weight.shape[1]
    return {
        "LENGTH": projected.shape[2],
        "INNER": inner,
        "STATE": (conv_weight.shape[1] - inner) // 2,
        "WIDTH": projected.shape[3],
        "TAPS": conv_weight.shape[3],
        "PATH": path,
        "FAST": not triton.interpreting(),
    }
