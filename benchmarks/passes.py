"""What is timed of a function or model: its forward alone, or its forward and the backward with every gradient."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.case import Run


def forward_only(forward: Callable[[], object]) -> Run:
    """`forward` without a graph."""

    def run() -> None:
        with torch.no_grad():
            forward()

    return run


def forward_and_backward(forward: Callable[[], Tensor | tuple[Tensor, ...]], leaves: Iterable[Tensor]) -> Run:
    """`forward` and the gradients of all `leaves`, given a random gradient of everything that `forward` returns."""
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def outputs() -> tuple[Tensor, ...]:
        result = forward()
        return (result,) if isinstance(result, Tensor) else result

    grads: list[Tensor] = []

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        results = outputs()
        if not grads:
            grads.extend(torch.randn_like(result) for result in results)
        torch.autograd.backward(results, grads)

    return run
