"""A logit as a sum: over the parts of the stream, and within a mixer over the positions that it came from.

The stream is a sum of what the embedding and every layer added to it, and the logit is linear in the stream once the
final norm's scale is held at what it is:

    logit = bias + sum over parts of  w . (weight * part) / rms(stream)

In the same way what a mixer adds at position i is linear in the values x_j, with the token-mixing matrix M, the gate
and the norm behind it held:

    output_i = out_proj(factor_i * (sum_j M_ij x_j + D x_i))

Both sums are exact: each result carries the logit (or the part) that its values add up to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.lab.mechanisms import taken_apart
from mambakit.lab.mechanisms.hooks import Cache, hook_names, run_with_cache
from mambakit.lab.mechanisms.stack import check_rows, head_of, stack_of
from mambakit.nn import Mamba


@dataclass(frozen=True)
class Attribution:
    """A number as the sum of its parts.

    Attributes:
        parts: their names.
        values: (batch, parts), what each adds.
        total: (batch,), what they add up to: the logit, or the difference of two.
    """

    parts: tuple[str, ...]
    values: Tensor
    total: Tensor


def logit_attribution(
    model: nn.Module,
    inputs: Any,
    target: int | Tensor,
    *,
    against: int | Tensor | None = None,
    position: int = -1,
    head: nn.Module | None = None,
    **arguments: Any,
) -> Attribution:
    """What the embedding, each mixer and each MLP add to a logit, the final norm's scale held.

    Args:
        model, inputs, arguments: as in `run_with_cache`.
        target: the output whose logit it is, one for all or (batch,).
        against: another, whose logit is taken off.
        position: whose logit it is.
        head: the linear layer that makes logits, for models that don't name it `lm_head` or `head`.

    Raises DataError for a model without a head, or one whose dropout is at work.
    """
    _check_dropout(model)
    added = (".mixer.output", ".mlp.output")
    parts = [name for name in hook_names(model) if name == "embedded" or name.endswith(added)]
    _, cache = run_with_cache(model, inputs, parts, **arguments)
    _check_position(inputs, cache["embedded"], position)
    stream = torch.stack(
        [cache[name][:, position].to(_wide(cache[name])) for name in parts], dim=1
    )  # (batch, parts, d)
    direction, bias = _direction(model, head, target, against, stream.sum(1))
    values = torch.cat([(stream * direction[:, None]).sum(-1), bias[:, None]], dim=1)
    return Attribution((*parts, "bias"), values, values.sum(1))


def source_attribution(
    model: nn.Module,
    inputs: Any,
    target: int | Tensor,
    layer: int,
    *,
    against: int | Tensor | None = None,
    position: int = -1,
    head: nn.Module | None = None,
    **arguments: Any,
) -> Attribution:
    """What a mixer adds to a logit, by the positions whose values it read.

    The parts are the positions, as text, then "D", the path past the state, and "bias", that of the out-projection.
    Their total is the value of `layers.I.mixer.output` in `logit_attribution`.

    Args:
        layer: the layer of the mixer, a Mamba of any generation.
        model, inputs, target, against, position, head, arguments: as in `logit_attribution`.

    Raises DataError also for a layer that does not exist, or of another mixer.
    """
    _check_dropout(model)
    layers = stack_of(model).layers
    if not 0 <= layer < len(layers) or not taken_apart.points_of(layers[layer].mixer):
        raise DataError(f"layer must be that of a Mamba mixer, from 0 to {len(layers) - 1}, got {layer}")
    mixer, prefix = layers[layer].mixer, f"layers.{layer}.mixer."
    if not isinstance(mixer.out_proj, nn.Linear):
        raise DataError(f"out_proj of layer {layer} is a {type(mixer.out_proj).__name__}: merge adapters first")
    names = [prefix + name for name in _SOURCE]
    _, cache = run_with_cache(model, inputs, [*names, f"layers.{len(layers) - 1}.residual"], **arguments)
    stream = cache[f"layers.{len(layers) - 1}.residual"]
    _check_position(inputs, stream, position)
    stream = stream[:, position]
    direction, _ = _direction(model, head, target, against, stream)
    read = Cache({name: cache[prefix + name] for name in _SOURCE})
    by_source, through_D = _by_source(mixer, read, direction, position)
    out_bias = mixer.out_proj.bias
    bias = direction.new_zeros(direction.shape[0]) if out_bias is None else (direction * out_bias).sum(-1)
    values = torch.cat([by_source, through_D[:, None], bias[:, None]], dim=1)
    positions = tuple(str(j) for j in range(by_source.shape[1]))
    return Attribution((*positions, "D", "bias"), values, values.sum(1))


_SOURCE = ("x", "z", "mixing", "scan_output")


def _by_source(mixer: Any, cache: Cache, direction: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """What reaches `position` from every position through the state (batch, length), and through D (batch,)."""
    x, z, matrix, y = (cache[name] for name in _SOURCE)
    factors = taken_apart.gate_factors(mixer, y, z)[:, position]  # ([rank,] heads, headdim) or (d_inner)
    weight = (direction.to(mixer.out_proj.weight) @ mixer.out_proj.weight).view(-1, *_width(mixer))
    if factors.dim() == 4:
        weight = weight[:, None]
    weights = factors * weight  # of the entries of the scan's output at `position`
    row = matrix[..., position, :]  # (batch, heads, [rank, rank,] length)
    values = taken_apart.values(mixer, x)
    through_D = (weights * taken_apart.skip(mixer, x)[:, position]).flatten(1).sum(1)
    if isinstance(mixer, Mamba):
        return torch.einsum("bd,bdj,bjd->bj", weights, row, values), through_D
    if factors.dim() == 4:
        return torch.einsum("brhp,bhrsj,bjshp->bj", weights, row, values), through_D
    return torch.einsum("bhp,bhj,bjhp->bj", weights, row, values), through_D


def _width(mixer: Any) -> tuple[int, ...]:
    """The axes of what a mixer's scan puts out at one position, ranks left out."""
    return (mixer.d_inner,) if isinstance(mixer, Mamba) else (mixer.heads, mixer.headdim)


def _direction(
    model: nn.Module, head: nn.Module | None, target: int | Tensor, against: int | Tensor | None, stream: Tensor
) -> tuple[Tensor, Tensor]:
    """What the stream (batch, d_model) is multiplied by to make the logit, and the head's bias (batch,)."""
    weight, bias = head_of(model, head)
    norm: Any = stack_of(model).norm_f
    batch = stream.shape[0]
    row, added = _rows(weight, bias, target, batch, "target")
    if against is not None:
        other, other_bias = _rows(weight, bias, against, batch, "against")
        row, added = row - other, added - other_bias
    eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
    scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    return row * norm.weight * scale, added


def _rows(weight: Tensor, bias: Tensor | None, index: int | Tensor, batch: int, name: str) -> tuple[Tensor, Tensor]:
    chosen = torch.as_tensor(index, device=weight.device).expand(batch)
    if ((chosen < 0) | (chosen >= weight.shape[0])).any():
        raise DataError(f"{name} must be from 0 to {weight.shape[0] - 1}, the outputs of the head")
    return weight[chosen], weight.new_zeros(batch) if bias is None else bias[chosen]


def _check_position(inputs: Any, stream: Tensor, position: int) -> None:
    check_rows(inputs, stream)
    if not -stream.shape[1] <= position < stream.shape[1]:
        raise DataError(f"position must be within {stream.shape[1]} positions, got {position}")


def _check_dropout(model: nn.Module) -> None:
    if any(layer.training and layer.dropout > 0 for layer in stack_of(model).layers):
        raise DataError("dropout is at work, and parts would not add up: call model.eval() first")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
