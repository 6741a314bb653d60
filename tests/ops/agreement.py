"""Holding an operation's backend against the reference: outputs and the gradients of every input.

Bounds are ratios of norms, ||got - expected|| / ||expected||: float32 1e-5 for outputs and 1e-4 for gradients, and the
rounding of the stored dtype for the half-precision ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

OUTPUT_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT_BOUND = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = tuple(OUTPUT_BOUND)

Tensors = Mapping[str, Tensor | None]
Operation = Callable[..., tuple[Tensor, ...]]


def error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, absolute where the expected norm is nothing; infinite for NaN."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (got.double() - expected.double()).norm()
    ratio = (difference / expected.double().norm().clamp(min=1e-6)).item()
    return ratio if ratio == ratio else float("inf")


def assert_backend_agrees(
    operation: Operation,
    tensors: Tensors,
    backend: str,
    dtype: torch.dtype,
    differentiable: Sequence[str] | None = None,
) -> None:
    """`operation(**tensors, backend=...)` gives the outputs and gradients of the reference in float64.

    `tensors` are taken in the dtypes they have; `dtype` names the bounds. The reference gets the same values.
    """
    for name, got, expected, is_gradient in compared(operation, tensors, backend, differentiable):
        assert_close(name, got, expected, dtype, is_gradient)


def assert_close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, is_gradient: bool) -> None:
    found = error(got, expected)
    assert found <= (GRADIENT_BOUND if is_gradient else OUTPUT_BOUND)[dtype], f"{name}: {found:.1e}"


def compared(
    operation: Operation, tensors: Tensors, backend: str, differentiable: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """Every output and then every gradient: its name, the backend's, the reference's, whether it is a gradient."""
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()]
    names = names if differentiable is None else [name for name in names if name in differentiable]
    mine = {name: _leaf(tensor) for name, tensor in tensors.items()}
    exact = {
        name: _leaf(None if t is None else t.double() if t.is_floating_point() else t) for name, t in tensors.items()
    }
    got = operation(**mine, backend=backend)
    expected = operation(**exact, backend="reference")
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        yield f"output {index}", a, b, False

    # In the dtype of the outputs, for both alike: what rounding takes off a gradient is none of the backend's errors.
    grads = [torch.randn_like(b).to(a.dtype) for a, b in zip(got, expected, strict=True)]
    got_grads = _gradients(got, [mine[name] for name in names], grads)
    expected_grads = _gradients(expected, [exact[name] for name in names], grads)
    for name, a, b in zip(names, got_grads, expected_grads, strict=True):
        yield f"gradient of {name}", a, b, True


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the leaves; zero for one that nothing depends on, as at length 0."""
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _leaf(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, strides included, as a leaf that asks for a gradient."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()
