"""Stacks of Mamba-2 with one head over sequences of a few tokens, many models at once, for training on a GPU.

    z, x, B, C, dt = in_proj norm(hidden)
    x, B, C = silu(conv(x, B, C))  [+ or * themselves]
    y       = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    hidden += out_proj norm(y silu(z))

`nn.Mamba2` runs these as operations for any length, whose scan is made for chunks of 16 to 64 tokens and keeps a state
for each, larger than eight tokens are. Here what stands between the projections is one kernel forward and two backward,
which read and write what the projections made and take, and no more. A block's share is added where the next one
normalises, and the gradients of the projections are summed in parts, so that a few narrow matrices fill a GPU.

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
_LAYERS = triton.Kernels("short_layers")
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
    hidden = _Embedded.apply(table, tokens)  # (models, batch, length, d_model)
    if isinstance(model, MambaPosEncoding):
        if model.position is None:
            places = torch.arange(length, device=tokens.device)
            hidden = hidden + sinusoids(places, hidden.shape[-1]).to(hidden.dtype)
        else:
            hidden = hidden + parameters["position.weight"][:, None, :length]
    hidden, added = hidden.flatten(1, 2), None  # the last block's share is added where it is normalised next
    layers: Any = model.backbone.layers
    of_layers: list[dict[str, Tensor]] = [{} for _ in layers]
    for name, parameter in parameters.items():
        if name.startswith("backbone.layers."):
            index, rest = name.removeprefix("backbone.layers.").split(".", 1)
            of_layers[int(index)][rest] = parameter
    # Of all layers at once: a copy that aligns them, and one that gathers their gradients.
    into, out_of = (torch.stack([own[f"mixer.{name}.weight"] for own in of_layers]) for name in ("in_proj", "out_proj"))
    into = F.pad(into, (0, 0, 0, -into.shape[2] % 8))  # rows of whole sectors for what they give
    for layer, own, weight, out_weight in zip(layers, of_layers, into.unbind(), out_of.unbind(), strict=True):
        hidden, normed = _Normalised.apply(hidden, added, own["norm.weight"], layer.norm.eps)
        projected = _Linear.apply(normed, weight).view(models, batch, length, -1)
        of_mix = (own[f"mixer.{name}"] for name in _OF_MIX)
        y = _Mix.apply(projected, *of_mix, layer.mixer.norm.eps, _PATHS[type(layer.mixer)])
        added = _Linear.apply(y.flatten(1, 2), out_weight)
    last = _Last.apply(hidden, added, length, answers)
    _, last = _Normalised.apply(last, None, parameters["backbone.norm_f.weight"], model.backbone.norm_f.eps)
    head = parameters.get("head.weight", table)  # one matrix where they are tied
    return _Linear.apply(last, head).view(models, batch, answers, -1)


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


class _Embedded(torch.autograd.Function):
    """Rows of every model's table (models, vocabulary, d_model) for its tokens (models, batch, length).

    A row's gradient is a product with the tokens as rows of one 1 each: torch sorts them to add in a fixed order.
    """

    _TILE, _WORDS = 64, 64

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens.contiguous())
        ctx.vocabulary = table.shape[1]
        first_row = torch.arange(len(table), device=tokens.device)[:, None, None] * ctx.vocabulary
        return F.embedding(tokens + first_row, table.flatten(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        models, rows, columns = len(tokens), tokens[0].numel(), grad.shape[-1]
        tile, words = _Embedded._TILE, _Embedded._WORDS
        programs = min(_PARTS, -(-rows // tile))
        shares = grad.new_empty(models, programs, ctx.vocabulary, columns)
        grid = programs, models, -(-ctx.vocabulary // words)
        _LAYERS.embedding_backward[grid](
            tokens, grad.contiguous(), shares, rows, ctx.vocabulary, COLUMNS=columns, TILE=tile, WORDS=words
        )
        return shares.sum(1), None


class _Normalised(torch.autograd.Function):
    """x + added, and its rows over the roots of their mean squares times a weight.

    x and added, which may be None, are (models, rows, d_model), the weight (models, d_model).
    """

    _TILE = 64

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        models, rows, columns = x.shape
        x, weight = x.contiguous(), _of_models(weight)
        total = x.view_as(x) if added is None else torch.empty_like(x)
        y = torch.empty_like(x)
        ctx.grid = (-(-rows // _Normalised._TILE), models)
        ctx.launched = (rows, weight.stride(0), eps), {"COLUMNS": columns, "TILE": _Normalised._TILE}
        numbers, sizes = ctx.launched
        _LAYERS.normalise[ctx.grid](
            x, None if added is None else added.contiguous(), weight, total, y, *numbers, **sizes
        )
        ctx.two = added is not None
        ctx.save_for_backward(total, weight)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_y: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        numbers, sizes = ctx.launched
        d_x = torch.empty_like(total)
        shares = total.new_empty(ctx.grid[1], ctx.grid[0], total.shape[2])
        _LAYERS.normalise_backward[ctx.grid](
            total, weight, d_total.contiguous(), d_y.contiguous(), d_x, shares, *numbers, **sizes
        )
        return d_x, d_x if ctx.two else None, shares.sum(1), None


class _Last(torch.autograd.Function):
    """x + added, (models, batch * length, d_model), at the last tokens alone, (models, batch * answers, d_model)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, length: int, answers: int) -> Tensor:
        ctx.shape = models, _, columns = x.shape
        ctx.of_tokens = models, -1, length, columns
        ctx.answers = answers
        first, second = (tensor.view(ctx.of_tokens)[:, :, -answers:] for tensor in (x, added))
        return (first + second).view(models, -1, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        found = grad.new_zeros(ctx.shape)
        rows = found.view(ctx.of_tokens)[:, :, -ctx.answers :]
        rows.copy_(grad.view(rows.shape))
        return found, found, None, None


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
