"""The lab's models: what each changes, and that reading in parts is reading at once."""

import pytest
import torch
import torch.nn.functional as F

from mambakit import nn as mambakit_nn
from mambakit import ops
from mambakit.errors import DataError
from mambakit.lab.mixers import GatedMamba2, ResidualMamba, ResidualMamba2, ResidualMamba3
from mambakit.lab.models import (
    MODELS,
    MambaForComposite,
    MambaOnesConv,
    MambaPosEncoding,
    MambaWithResidual,
    TransformerForComposite,
    sinusoids,
)
from mambakit.nn import Mamba, Mamba2, Stepper

SMALL = {"n_layers": 2, "d_model": 16, "vocab_size": 30}
GENERATIONS = ("mamba", "mamba2", "mamba3")


def tokens(length: int = 9) -> torch.Tensor:
    return torch.randint(0, 30, (3, length), generator=torch.Generator().manual_seed(0))


def made(name: str, mixer: str = "mamba2") -> MambaForComposite:
    torch.manual_seed(1)
    options = {} if name.startswith("transformer") else {"mixer": mixer, "d_state": 8}
    return MODELS[name](**SMALL, **options, gamma=0.5)


every_model = pytest.mark.parametrize(
    ("name", "mixer"),
    [
        *((name, mixer) for name in MODELS if not name.startswith("transformer") for mixer in GENERATIONS),
        ("transformer", "mamba2"),
        ("transformer-conv", "mamba2"),
    ],
)


@every_model
def test_logits_are_those_of_the_last_token(name: str, mixer: str) -> None:
    model = made(name, mixer)
    assert model(tokens()).shape == (3, 30)
    torch.testing.assert_close(model(tokens()), model(tokens(), 4)[:, -1])


@every_model
def test_a_sequence_read_in_parts_is_one_read_at_once(name: str, mixer: str) -> None:
    model = made(name, mixer)
    whole, _ = model.read(tokens())
    first, state = model.read(tokens()[:, :4])
    second, _ = model.read(tokens()[:, 4:], state, start=4)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)


@every_model
def test_a_config_makes_the_same_model_again(name: str, mixer: str) -> None:
    model = made(name, mixer)
    again = type(model)(**model.get_config())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()), model(tokens()))


def test_the_config_names_the_shape() -> None:
    expected = {"n_layers": 2, "gamma": 1.0, "vocab_size": 100, "d_model": 32, "d_state": 128, "d_conv": 4, "expand": 2}
    config = MambaForComposite(vocab_size=100).get_config()
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("mixer", GENERATIONS)
def test_kernels_of_one_stay_one_and_the_rest_learns(mixer: str) -> None:
    model = MambaOnesConv(**SMALL, mixer=mixer, d_state=8)
    kernels = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv1d)]
    assert len(kernels) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.head.weight.detach().clone()
    model(tokens()).square().sum().backward()
    optimizer.step()
    assert all((kernel == 1).all() for kernel in kernels)
    assert not torch.equal(model.head.weight, before)


def test_with_kernels_of_one_the_first_convolution_can_not_tell_an_order() -> None:
    mixer = MambaOnesConv(**SMALL, d_state=8).backbone.layers[0].mixer
    hidden = torch.randn(1, 4, mixer.d_xBC)
    ours, _ = mixer.convolve(hidden, None, None)
    swapped, _ = mixer.convolve(hidden[:, [2, 1, 0, 3]], None, None)
    torch.testing.assert_close(ours[:, 3], swapped[:, 3])


def convolved(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.silu(ops.causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias))  # type: ignore


@pytest.mark.parametrize("kind", [ResidualMamba, ResidualMamba2, ResidualMamba3])
def test_the_residual_adds_what_the_convolution_read(kind: type[torch.nn.Module]) -> None:
    mixer = kind(16, d_state=8, **({} if kind is ResidualMamba else {"headdim": 32}))
    x = torch.randn(2, 7, mixer.conv1d.weight.shape[0])  # type: ignore[union-attr]
    y, _ = mixer.convolve(x, None, None)  # type: ignore[operator]
    torch.testing.assert_close(y, convolved(mixer, x) + x)


def test_the_gate_multiplies_by_what_the_convolution_read() -> None:
    mixer = GatedMamba2(16, d_state=8, headdim=32)
    x = torch.randn(2, 7, mixer.d_xBC)
    y, _ = mixer.convolve(x, None, None)
    torch.testing.assert_close(y, convolved(mixer, x) * x)


@pytest.mark.parametrize("mixer", GENERATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_path_changes_what_the_model_computes(mixer: str, gated: bool) -> None:
    changed = MambaWithResidual(**SMALL, mixer=mixer, d_state=8, gated=gated)
    plain = MambaPosEncoding(**SMALL, mixer=mixer, d_state=8, d_conv=4)
    plain.load_state_dict(changed.state_dict())
    assert not torch.allclose(plain(tokens()), changed(tokens()), atol=1e-3)


@pytest.mark.parametrize("kind", [ResidualMamba2, GatedMamba2, ResidualMamba])
def test_the_compiled_stack_leaves_changed_paths_to_their_layers(kind: type[Mamba] | type[Mamba2]) -> None:
    mixer = kind(16, d_state=8, **({} if kind is ResidualMamba else {"headdim": 32}))
    stepper = Stepper(mixer)
    x = torch.randn(1, 5, 16)
    whole, _ = mixer(x)
    with torch.no_grad():
        steps = torch.stack([stepper(x[:, t]) for t in range(5)], dim=1)
    assert stepper.backend == "layers"
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


def test_mamba3_is_itself_unless_a_convolution_is_asked_for() -> None:
    assert type(made("standard", "mamba3").backbone.layers[0].mixer) is mambakit_nn.Mamba3
    assert hasattr(MambaForComposite(**SMALL, mixer="mamba3", d_conv=4).backbone.layers[0].mixer, "conv1d")


def test_sinusoids_are_those_of_the_formula() -> None:
    table = sinusoids(torch.arange(5), 6)
    for place in range(5):
        for pair in range(3):
            angle = torch.tensor(place / 10000 ** (2 * pair / 6))
            torch.testing.assert_close(table[place, 2 * pair], angle.sin())
            torch.testing.assert_close(table[place, 2 * pair + 1], angle.cos())


def test_positions_beyond_the_learned_ones_are_refused() -> None:
    with pytest.raises(DataError, match="at most max_seq_len = 8"):
        MambaPosEncoding(max_seq_len=8, **SMALL, d_state=8)(tokens(9))


def test_tied_embeddings_are_one_matrix() -> None:
    model = MambaForComposite(**SMALL, d_state=8, tie_embeddings=True)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MambaForComposite(mixer="lstm"), "mixer must be one of mamba, mamba2, mamba3"),
        (lambda: MambaForComposite(mixer="mamba", headdim=4), "headdim is of Mamba-2"),
        (lambda: MambaOnesConv(mixer="mamba3", d_conv=0), "d_conv must be at least 1"),
        (lambda: MambaPosEncoding(encoding="rotary"), "encoding must be learned or sinusoidal"),
    ],
)
def test_what_does_not_fit_is_named(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()  # type: ignore[operator]


def test_the_transformer_takes_a_convolution() -> None:
    assert TransformerForComposite(**SMALL).backbone.layers[0].mixer.conv1d is None
    assert TransformerForComposite(**SMALL, d_conv=4).backbone.layers[0].mixer.conv1d is not None
