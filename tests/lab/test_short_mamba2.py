"""Mamba-2 over a few tokens: what the kernels give is what the models give. Triton's interpreter runs them here."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.lab import short_mamba2
from mambakit.lab.grouped import GroupedModels, losses
from mambakit.lab.models import MODELS, MambaForComposite
from mambakit.lab.short_mamba2 import has_kernels, logits, serves

MODELS_OF_A_GROUP, BATCH, LENGTH, VOCABULARY = 2, 3, 4, 11
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def model(name: str = "standard", **options: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[name](2, 0.5, VOCABULARY, d_model=16, **{"d_state": 32, **options})


def stacked(one: MambaForComposite) -> dict[str, Tensor]:
    """Parameters of several such models, away from where ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, parameter in one.named_parameters():
        spread = 0.3 * torch.randn(MODELS_OF_A_GROUP, *parameter.shape, generator=generator)
        found[name] = (parameter.detach() + spread).requires_grad_(parameter.requires_grad)
    return found


@needs_triton
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", {}),
        ("standard", {"tie_embeddings": True}),
        ("ones", {}),
        ("learned", {}),
        ("sinusoidal", {}),
        ("residual", {}),
        ("gated", {}),
    ],
)
def test_logits_and_gradients_are_those_of_the_models(name: str, options: dict[str, Any]) -> None:
    one = model(name, **options)
    assert has_kernels(one)
    check(one, BATCH)


@needs_triton
def test_programs_add_up_what_they_find_in_several_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_mamba2, "_PROCESSORS", 1)  # a dozen programs for 40 sequences, 160 tokens
    check(model(d_state=64), 20)


def check(one: MambaForComposite, batch: int) -> None:
    """Compare logits and gradients by kernels with those by the models."""
    tokens = torch.randint(0, VOCABULARY, (MODELS_OF_A_GROUP, batch, LENGTH))
    targets = torch.randint(0, VOCABULARY, (MODELS_OF_A_GROUP, batch, 2))
    found = []
    for by_kernels in (True, False):
        parameters = stacked(one)

        def apply(own: Any, rows: Tensor) -> Tensor:
            return torch.func.functional_call(one, own, (rows, 2))

        if by_kernels:
            made = logits(one, parameters, tokens, 2)
        else:
            made = torch.stack([apply({n: p[i] for n, p in parameters.items()}, tokens[i]) for i in range(2)])
        losses(made, targets).sum().backward()
        found.append([made.detach(), *(p.grad for p in parameters.values() if p.requires_grad)])
    for got, expected in zip(*found, strict=True):
        assert got is not None
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": "mamba"},
        {"mixer": "mamba3"},
        {"d_state": 24},
        {"headdim": 16},
        {"mixer_options": {"conv_bias": False}},
        {"mixer_options": {"bias": True}},
        {"mixer_options": {"norm_before_gate": True}},
        {"dtype": torch.float64},
    ],
)
def test_models_of_another_kind_have_no_kernels(options: dict[str, Any]) -> None:
    assert not has_kernels(model(**options))


def test_a_transformer_has_no_kernels() -> None:
    assert not has_kernels(MODELS["transformer"](2, d_model=16))


def test_without_a_gpu_groups_are_run_as_before() -> None:
    tokens = torch.randint(0, VOCABULARY, (MODELS_OF_A_GROUP, BATCH, LENGTH))
    one = model()
    assert not serves(one, tokens)
    assert torch.equal(GroupedModels([one, one], loop=True)(tokens, 1)[0], one(tokens[0], 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["standard", "residual", "learned"])
def test_on_a_gpu_a_group_gives_what_its_models_give(name: str) -> None:
    models = [model(name) for _ in range(MODELS_OF_A_GROUP)]
    tokens = torch.randint(0, VOCABULARY, (MODELS_OF_A_GROUP, BATCH, LENGTH))
    expected = torch.stack([one(own, 2) for one, own in zip(models, tokens, strict=True)])
    grouped = GroupedModels([one.cuda() for one in models])
    assert serves(models[0], tokens.cuda())
    torch.testing.assert_close(grouped(tokens.cuda(), 2).cpu(), expected, rtol=1e-3, atol=1e-4)
