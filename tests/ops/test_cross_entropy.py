"""The cross entropy: every backend against torch's in float64, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from tests.ops.backends import DEVICE, TRITON
from torch import Tensor

from mambakit.ops import cross_entropy

BACKENDS = [*TRITON, "portable", "reference"]


def exact(logits: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    wide = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(wide, targets, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def some(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits spread over decades, targets with one that is left out."""
    logits = (4 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    targets = torch.randint(classes, (rows,), device=DEVICE)
    targets[rows // 2] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "classes"), [(3, 5), (7, 264), (4, 5001)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_agrees_with_torch_in_float64(
    backend: str, rows: int, classes: int, reduction: str, dtype: torch.dtype
) -> None:
    logits, targets = some(rows, classes, dtype)
    expected, expected_grad = exact(logits, targets, reduction)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(loss * 3, leaf)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (grad.double() - 3 * expected_grad).norm() <= bound * 3 * expected_grad.norm()
    assert not grad[rows // 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_stay_finite(backend: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 0.0]], device=DEVICE).requires_grad_()
    targets = torch.tensor([1, 2], device=DEVICE)
    loss = cross_entropy(logits, targets, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    expected, expected_grad = exact(logits, targets, "sum")
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(grad.double(), expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart(backend: str) -> None:
    logits, targets = some(5, 40, torch.float32)
    expected, _ = exact(logits[:, 3:30], targets % 27, "sum")
    torch.testing.assert_close(
        cross_entropy(logits[:, 3:30], targets % 27, reduction="sum", backend=backend).double(), expected
    )


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
def test_a_class_that_does_not_exist_is_not_passed_by() -> None:
    logits, _ = some(2, 5, torch.float32)
    assert cross_entropy(logits, torch.tensor([1, 5], device=DEVICE), backend="triton").isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_target_there_is_no_mean(backend: str) -> None:
    logits, _ = some(2, 5, torch.float32)
    assert cross_entropy(logits, torch.tensor([-100, -100], device=DEVICE), backend=backend).isnan()


def test_what_does_not_fit_is_named() -> None:
    logits, targets = some(2, 5, torch.float32)
    with pytest.raises(ValueError, match="reduction must be"):
        cross_entropy(logits, targets, reduction="none")
    with pytest.raises(ValueError, match="targets must have shape"):
        cross_entropy(logits, targets[:1])
    with pytest.raises(ValueError, match="logits must have shape"):
        cross_entropy(logits[0], targets)
