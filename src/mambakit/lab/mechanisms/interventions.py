"""Putting other values into a run: patching from another run, blocking the way between positions, substitution.

Patching and blocking are the two experiments by which "Achilles' Heel of Mamba" (arXiv 2509.17514) finds where
information travels: block the entry (i, j) of a token-mixing matrix, and nothing reaches i from j through that layer's
state; substitute what left the convolution at some position, and see whether the answer follows.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.lab.mechanisms.hooks import Cache, Hook, matching, run_with_hooks


def substituted(values: Tensor, positions: Sequence[int] | None = None) -> Hook:
    """A hook that puts `values` (batch, length, ...) in the place of what was computed, at these positions or at all.

    >>> model = nn.Backbone(16, 2, mixer_options={"d_state": 4})
    >>> hook = substituted(torch.zeros(1, 10, 32), positions=[3])
    >>> output = run_with_hooks(model, torch.randn(1, 10, 16), {"layers.0.mixer.convolved": hook})
    """

    def hook(tensor: Tensor) -> Tensor:
        if positions is None:
            return values
        if values.shape != tensor.shape:
            raise DataError(f"values must have shape {tuple(tensor.shape)} to stand in, got {tuple(values.shape)}")
        replaced = tensor.clone()
        where = _within(positions, tensor.shape[1])
        replaced[:, where] = values[:, where].to(tensor)
        return replaced

    return hook


def patch(
    model: nn.Module,
    inputs: Any,
    cache: Cache,
    names: str | Iterable[str],
    positions: Sequence[int] | None = None,
    **arguments: Any,
) -> Any:
    """`model(inputs, **arguments)` with tensors of another run in the place of its own: activation patching.

    Args:
        model, inputs, arguments: as in `run_with_cache`.
        cache: of a run on inputs of the same shape.
        names: names or patterns of what to take from it.
        positions: along the length; None for all. Negative ones count from the end.

    Raises DataError for names that the model or the cache does not have, and positions outside the sequence.
    """
    found = matching(model, [names] if isinstance(names, str) else names)
    for name in found:
        if name not in cache:
            raise DataError(f"{name} is not in the cache: keep it when running the model that the patch comes from")
        if positions is not None and name.endswith(".mixing"):
            raise DataError(f"{name} has two axes of positions: patch it whole, or edit it by a hook of your own")
    return run_with_hooks(model, inputs, {name: substituted(cache[name], positions) for name in found}, **arguments)


def patching_effects(
    model: nn.Module,
    inputs: Any,
    cache: Cache,
    names: str | Iterable[str],
    metric: Callable[[Any], Tensor],
    **arguments: Any,
) -> tuple[tuple[str, ...], Tensor]:
    """What patching each name at each position alone does to a metric.

    Args:
        model, inputs, cache, names, arguments: as in `patch`.
        metric: makes a number of the model's output.

    Returns:
        the names, and (names, length) of the metric's values.
    """
    found = tuple(matching(model, [names] if isinstance(names, str) else names))
    if not all(name in cache for name in found):
        raise DataError("the cache lacks some of these names: keep them when running what the patches come from")
    length = cache[found[0]].shape[1]
    with torch.no_grad():
        rows = [
            torch.stack([metric(patch(model, inputs, cache, name, [t], **arguments)) for t in range(length)])
            for name in found
        ]
    return found, torch.stack(rows)


def blocked(entries: Iterable[tuple[int, int]], heads: Sequence[int] | None = None) -> Hook:
    """A hook for `layers.I.mixer.mixing` that sets entries of the token-mixing matrix to zero.

    Args:
        entries: pairs (i, j): what position i receives from position j, j <= i. The path through D, from a position to
            itself, stays open.
        heads: heads (in Mamba-1 channels) that are blocked; None for all.

    Raises DataError, when it runs, for entries above the diagonal or outside the sequence.

    >>> model = nn.Backbone(16, 2, "mamba2", {"headdim": 8})
    >>> output = run_with_hooks(model, torch.randn(1, 10, 16), {"layers.1.mixer.mixing": blocked([(9, 2), (9, 3)])})
    """
    pairs = list(entries)

    def hook(matrix: Tensor) -> Tensor:
        length = matrix.shape[-1]
        closed = torch.zeros(length, length, dtype=torch.bool, device=matrix.device)
        for i, j in pairs:
            if not 0 <= j <= i < length:
                raise DataError(f"entry ({i}, {j}) must have 0 <= j <= i < {length}, the length of the sequence")
            closed[i, j] = True
        if heads is None:
            return matrix.masked_fill(closed, 0.0)
        chosen = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
        chosen[_within(heads, matrix.shape[1])] = True
        return matrix.masked_fill(chosen.view(-1, *[1] * (matrix.dim() - 2)) & closed, 0.0)

    return hook


def _within(indices: Sequence[int], size: int) -> list[int]:
    for index in indices:
        if not -size <= index < size:
            raise DataError(f"{index} is outside of {size} positions or heads")
    return list(indices)
