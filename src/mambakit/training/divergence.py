"""Where a loss stopped being finite: in the batch, the weights, the output of a module, the loss, on the way back.

The search repeats the work on the one batch where it happened, watching every module; a healthy run pays nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.training.batches import named_tensors

_UNSCALED = 1e3  # standardised data stays far below


def find_origin(model: nn.Module, objective: Callable[..., Any], batch: Any, indices: Tensor) -> str:
    """One sentence or two on what was first not finite (NaN or infinite) when `objective(model, batch)` was computed.

    `indices` (samples,) int64 are the positions in the data of the samples in the batch. The gradients of the model
    are overwritten.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"The weights were no longer finite before this step, first {name!r}."
    data = _origin_in_batch(batch, indices)
    model.zero_grad()
    with _watched(model) as found, torch.enable_grad():
        loss, _ = objective(model, batch)
        if _is_finite(loss) and loss.requires_grad:
            loss.backward()
    if found:
        return f"{data} The first values that are not finite come from {found[0]}."
    if not _is_finite(loss):
        return f"{data} Every module's output is finite, so it began in the computation of the loss."
    return f"{data} Loss and gradients are finite one by one, but too large for their norm."


def _origin_in_batch(batch: Any, indices: Tensor) -> str:
    for name, tensor in named_tensors(batch):
        if _is_finite(tensor):
            continue
        place = f"The data holds values that are not finite, in {name}"
        if tensor.ndim and len(tensor) == len(indices):
            bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)  # (samples,)
            return f"{place}, first at sample {int(indices[bad.cpu()].min())}."
        return f"{place}."
    largest = {
        name: float(tensor.abs().max())
        for name, tensor in named_tensors(batch)
        if tensor.is_floating_point() and tensor.numel()
    }
    for name, value in largest.items():
        if value > _UNSCALED:
            return f"The data of the batch is finite, but reaches {value:.1e} in {name}: standardise it."
    return "The data of the batch is finite."


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect, in the order in which they come, the modules and gradients that are not finite."""
    found: list[str] = []

    def watch_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(_is_finite(tensor) for _, tensor in named_tensors(output)):
                place = f"the module {name!r} ({type(module).__name__})" if name else "the model's own forward"
                found.append(place)

        return hook

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not _is_finite(gradient):
                found.append(f"the gradient of {name!r}")

        return hook

    handles = [module.register_forward_hook(watch_output(name)) for name, module in model.named_modules()]
    handles += [
        parameter.register_hook(watch_gradient(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
