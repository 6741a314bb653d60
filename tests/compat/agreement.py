"""Holding a stand-in against its definition: the outputs, and the gradients of every tensor that goes in."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_same(got: Tensor, expected: Tensor, bound: float = 1e-10) -> None:
    """||got - expected|| <= bound ||expected||, and no NaN."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    ratio = ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()
    assert ratio <= bound, f"off by {ratio:.1e} of the norm"


def assert_agrees(
    function: Callable[..., object], definition: Callable[..., object], tensors: dict[str, Tensor], **options: object
) -> None:
    """Both give the same outputs in float64, and gradients for the tensors, which are passed by name."""
    mine, its = ({name: t.clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()} for _ in "ab")
    got, expected = (
        out if isinstance(out, tuple) else (out,) for out in (function(**mine, **options), definition(**its, **options))
    )
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    weights = [torch.randn_like(b) for b in expected]
    names = [name for name, t in tensors.items() if t.is_floating_point()]
    grads = (
        torch.autograd.grad(list(outs), [leaves[name] for name in names], weights)
        for outs, leaves in ((got, mine), (expected, its))
    )
    for name, a, b in zip(names, *grads, strict=True):
        try:
            assert_same(a, b)
        except AssertionError as wrong:
            raise AssertionError(f"gradient of {name}: {wrong}") from wrong
