"""Mamba-2 over a few tokens by one kernel: what it gives is what the mixer gives. Triton's interpreter runs it here."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambakit.lab import short_mamba2
from mambakit.lab.mixers import GatedMamba2, ResidualMamba2
from mambakit.lab.models import MambaForComposite
from mambakit.lab.short_mamba2 import mixed, without_states
from mambakit.nn import Mamba2

MODELS, BATCH, LENGTH, DIM = 2, 3, 4, 16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def mixer(kind: type[Mamba2] = Mamba2) -> Mamba2:
    torch.manual_seed(0)
    return kind(DIM, d_state=32, headdim=2 * DIM)


def stacked(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of several such mixers, (MODELS, ...) each, away from where ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, parameter in module.named_parameters():
        spread = 0.3 * torch.randn(MODELS, *parameter.shape, generator=generator)
        found[name] = (parameter.detach() + spread).requires_grad_()
    return found


@needs_triton
@pytest.mark.parametrize("kind", [Mamba2, ResidualMamba2, GatedMamba2])
def test_output_and_gradients_are_those_of_the_mixer(kind: type[Mamba2]) -> None:
    one = mixer(kind)
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(MODELS, BATCH, LENGTH, DIM, generator=generator) for _ in range(2))
    found = []
    for call in (lambda x: mixed(one, x), lambda x: one(x)[0]):
        module = _Called(one, call)
        parameters, given = stacked(module), x.clone().requires_grad_()

        def apply(own: Any, x: Tensor, module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, own, (x,))

        y = torch.vmap(apply)(parameters, given)
        (y * weight).sum().backward()
        found.append([y.detach(), given.grad, *(parameter.grad for parameter in parameters.values())])
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@needs_triton
def test_a_single_model_needs_no_axis_of_models() -> None:
    one = mixer()
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    y = mixed(one, x)
    torch.testing.assert_close(y, one(x)[0], rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "options", [{"d_state": 24}, {"headdim": DIM}, {"conv_bias": False}, {"bias": True}, {"norm_before_gate": True}]
)
def test_a_mixer_of_another_kind_stays_as_it_is(options: dict[str, Any]) -> None:
    model = nn.Sequential(Mamba2(DIM, **{"d_state": 32, "headdim": 2 * DIM, **options}))
    assert "forward" not in vars(without_states(model)[0])  # type: ignore[index]


def test_without_a_gpu_the_model_is_stepped_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_mamba2, "mixed", lambda *_: pytest.fail("the kernel was called"))
    model = MambaForComposite(2, d_model=DIM, d_state=32)
    tokens = torch.randint(0, 201, (BATCH, LENGTH))
    assert torch.equal(without_states(model)(tokens), model(tokens))


class _Called(nn.Module):
    """A mixer's parameters under another forward."""

    def __init__(self, one: Mamba2, call: Any) -> None:
        super().__init__()
        self.one, self._call = one, call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)
