"""Looking into a run: the logits of every layer's stream, the steps that it took, the taps of its convolutions."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.lab.mechanisms.hooks import run_with_cache
from mambakit.lab.mechanisms.stack import check_rows, head_of, stack_of
from mambakit.nn import Mamba2, Mamba3


def logit_lens(model: nn.Module, inputs: Any, *, head: nn.Module | None = None, **arguments: Any) -> Tensor:
    """The logits were the stream to end after each layer, (layers + 1, batch, length, outputs).

    The first are those of what enters the first layer, the last those of the model.

    Args:
        model, inputs, arguments: as in `run_with_cache`.
        head: the linear layer that makes logits, for models that don't name it `lm_head` or `head`.
    """
    weight, bias = head_of(model, head)
    norm = stack_of(model).norm_f
    _, cache = run_with_cache(model, inputs, ["embedded", "layers.*.residual"], **arguments)
    check_rows(inputs, cache["embedded"])
    streams = torch.stack([stream.to(norm.weight.dtype) for stream in cache.values()])  # type: ignore[arg-type]
    return F.linear(norm(streams).to(weight.dtype), weight, bias)


def delta_trace(model: nn.Module, inputs: Any, **arguments: Any) -> dict[int, Tensor]:
    """The step of every layer at every position, (batch, length, d_inner or heads), by layer.

    A small step passes a token by, a large one writes it over the past.
    """
    _, cache = run_with_cache(model, inputs, "layers.*.mixer.delta", **arguments)
    return cache.by_layer("mixer.delta")


def convolution_taps(model: nn.Module, part: str | None = None) -> dict[int, Tensor]:
    """The weights of every layer's convolution, (channels, d_conv), the present's tap last, by layer.

    Args:
        model: one with a stack of blocks.
        part: "x", "B" or "C", the channels of the convolution that are these; None for all.

    Raises DataError where no layer has a convolution, or no such part.
    """
    found: dict[int, Tensor] = {}
    for index, layer in enumerate(stack_of(model).layers):
        convolution = getattr(layer.mixer, "conv1d", None)
        if convolution is None:
            continue
        taps = convolution.weight.squeeze(1)
        found[index] = taps if part is None else _channels(layer.mixer, part, taps)
    if not found:
        raise DataError("no layer of this model has a convolution: Mamba and Mamba2 do")
    return found


def tap_cosine(model: nn.Module, part: str | None = None) -> dict[int, Tensor]:
    """The cosine between each two taps of a convolution over its channels, (d_conv, d_conv), by layer.

    Where all are near 1 the convolution adds its inputs up without telling their order, as one of ones does; where a
    tap stands out, a neighbour at that distance is told from the others. The arguments are those of `convolution_taps`.
    """
    taps = convolution_taps(model, part)
    normed: Mapping[int, Tensor] = {index: F.normalize(weight, dim=0) for index, weight in taps.items()}
    return {index: weight.mT @ weight for index, weight in normed.items()}


def _channels(mixer: Any, part: str, taps: Tensor) -> Tensor:
    sizes = {"x": len(taps)}
    if isinstance(mixer, Mamba2):
        sizes = {"x": mixer.d_inner, "B": mixer.n_groups * mixer.d_state, "C": mixer.n_groups * mixer.d_state}
    elif isinstance(mixer, Mamba3):  # one with a convolution put before its scan
        sizes = dict(zip(("x", "B", "C"), mixer.widths()[1:4], strict=True))
    if part not in sizes:
        raise DataError(f"part must be one of {', '.join(sizes)}, what this convolution reads, got {part!r}")
    return dict(zip(sizes, taps.split(list(sizes.values())), strict=True))[part]
