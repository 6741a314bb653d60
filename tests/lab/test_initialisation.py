"""Initialisation by one exponent: exactly N(0, d1^(-2 gamma)), and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.initialisation import initialise
from mambakit.lab.models import MODELS, MambaForComposite

WIDTH, VOCABULARY, TAPS = 32, 201, 4
KEPT_BY_THE_PAPER = ("A_log", "D", "B_bias", "C_bias")


def made(mixer: str) -> MambaForComposite:
    torch.manual_seed(0)
    return MambaForComposite(2, None, mixer=mixer, d_model=WIDTH, d_state=16)


def copies(model: MambaForComposite) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def fan_in(name: str, parameter: Tensor) -> int:
    if name.startswith("embedding"):
        return VOCABULARY
    return TAPS if "conv1d" in name else parameter.shape[1]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize("reading", ["paper", "seed"])
def test_weights_are_standard_normal_times_a_power_of_their_width(mixer: str, reading: str, gamma: float) -> None:
    model = made(mixer)
    before = copies(model)
    initialise(model, gamma, reading, torch.Generator().manual_seed(7))  # type: ignore[arg-type]
    generator, seen = torch.Generator().manual_seed(7), 0
    for name, parameter in model.named_parameters():
        own_name = name.rpartition(".")[2]
        if reading == "seed" and own_name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() < 2 or (reading == "paper" and own_name in KEPT_BY_THE_PAPER):
            assert torch.equal(parameter, before[name]), name
        else:
            width = parameter.shape[0] if reading == "seed" else fan_in(name, parameter)
            expected = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * width**-gamma
            assert torch.equal(parameter.double(), expected.float().double()), name
            seen += 1
    assert seen >= 6


def test_the_papers_reading_keeps_steps_and_rates_and_the_seeds_does_not() -> None:
    model = made("mamba")
    before = copies(model)
    initialise(model, 1.0, "paper")
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(mixer.dt_proj.bias, before["backbone.layers.0.mixer.dt_proj.bias"])
    assert torch.equal(mixer.A_log, before["backbone.layers.0.mixer.A_log"])
    initialise(model, 1.0, "seed")
    assert (mixer.dt_proj.bias == 0).all()
    assert not torch.equal(mixer.A_log, before["backbone.layers.0.mixer.A_log"])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_with_gamma_is_initialised_so(name: str) -> None:
    gamma, width = 0.8, 256
    model = MODELS[name](2, gamma, d_model=width)
    weight = model.backbone.layers[0].mixer.in_proj.weight  # type: ignore[union-attr]
    assert float(weight.detach().std()) == pytest.approx(width**-gamma, rel=0.02)


def test_an_unknown_reading_is_refused() -> None:
    with pytest.raises(DataError, match="reading must be one of paper, seed"):
        initialise(made("mamba"), 1.0, "code")  # type: ignore[arg-type]
