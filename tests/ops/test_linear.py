"""The linear layer is torch's own, by another library."""

import pytest
import torch
import torch.nn.functional as F
from tests.ops.agreement import error

from mambakit.ops import linear
from mambakit.ops.linear import _by_onednn


@pytest.mark.parametrize("shape", [(40, 7), (3, 50, 7), (2, 3, 20, 7), (5, 7), (0, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_are_torchs(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(11, 7)
    leaves = [x, weight, *([torch.randn(11)] if with_bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    got, expected = linear(*leaves), F.linear(*leaves)
    grad = torch.randn_like(expected)
    assert error(got, expected) < 1e-6
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert error(a, b) < 1e-5


def test_strided_and_broadcast_inputs() -> None:
    x = torch.randn(100, 20)[:, 3:10].requires_grad_()
    weight = torch.randn(7, 11).t().requires_grad_()
    assert error(linear(x, weight), F.linear(x, weight)) < 1e-6
    grads = torch.autograd.grad(linear(x, weight).sum(), [x, weight])  # an expanded gradient
    for a, b in zip(grads, torch.autograd.grad(F.linear(x, weight).sum(), [x, weight]), strict=True):
        assert error(a, b) < 1e-5


def test_only_the_gradients_that_are_asked_for_are_formed() -> None:
    x, weight = torch.randn(64, 7), torch.randn(11, 7, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_everything_but_plain_float32_is_left_to_torch() -> None:
    x, weight = torch.randn(64, 7), torch.randn(11, 7)
    assert not _by_onednn(x.double(), weight.double())
    assert not _by_onednn(x[:2], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert error(torch.vmap(linear, (0, None))(x.reshape(2, 32, 7), weight).reshape(64, 11), linear(x, weight)) < 1e-6
    assert error(torch.compile(linear, backend="aot_eager", fullgraph=True)(x, weight), linear(x, weight)) < 1e-6
