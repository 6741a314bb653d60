"""Half precision: what stays float32, how near results are, how training goes, and that extremes stay finite."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mambakit.nn import MIXERS, Backbone

OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"d_state": 4},
    "mamba2": {"d_state": 8, "headdim": 8},
    "mamba3": {"d_state": 8, "headdim": 8, "mimo_rank": 2},
    "s4d": {"d_state": 8},
    "attention": {"n_heads": 2},
}
RECURRENT = [name for name in OPTIONS if name != "attention"]  # attention has neither rates and steps nor a state ssm
WIDTH = 16
KEPT = {"A_log", "D", "dt_bias", "dt_proj.bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}
KEPT_IN_S4D = {"log_A_real", "A_imag", "B", "C", "D", "log_dt"}


@pytest.fixture(params=RECURRENT, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=OPTIONS, scope="module")
def any_name(request: pytest.FixtureRequest) -> str:
    return request.param


def mixer(name: str) -> nn.Module:
    return MIXERS[name](WIDTH, **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rates_and_steps_keep_every_bit_when_a_model_is_cast(name: str, dtype: torch.dtype) -> None:
    layer = mixer(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    kept = KEPT_IN_S4D if name == "s4d" else KEPT
    for key, value in layer.to(dtype).state_dict().items():
        if key in kept:
            assert torch.equal(value, before[key]), key
        assert value.dtype == (torch.float32 if key in kept else dtype), key


def test_a_cast_to_float64_and_back_to_half_leaves_float32(name: str) -> None:
    layer = mixer(name).double()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in layer.half().parameters()} == {torch.float32, torch.float16}


def test_gradients_of_what_is_kept_stay_float32(name: str) -> None:
    layer = mixer(name)
    layer(torch.randn(1, 5, WIDTH))[0].sum().backward()
    for parameter in layer.bfloat16().parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


def test_a_bfloat16_model_gives_nearly_what_a_float32_one_gives(name: str) -> None:
    layer, x = mixer(name), torch.randn(2, 40, WIDTH)
    with torch.no_grad():
        expected, _ = layer(x)
        y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert (y - expected).norm() < 2e-2 * expected.norm()


class Delayed(nn.Module):
    """Reads a sequence of numbers, and gives for each step the one a few steps before it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.backbone = Backbone(WIDTH, 1, name, OPTIONS[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.backbone(self.encoder(x))[0])


DELAY = 2
NOISE = 0.5  # variance of what no model can foresee: the loss stays above it, and its relative error has a meaning


def losses(name: str, autocast: bool) -> Tensor:
    torch.manual_seed(0)
    model = Delayed(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(300):
        x = torch.randn(8, 16, 1)
        target = torch.nn.functional.pad(x, (0, 0, DELAY, 0))[:, :-DELAY] + NOISE**0.5 * torch.randn(8, 16, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.slow
def test_training_in_bfloat16_follows_float32_within_two_percent(any_name: str) -> None:
    wide, narrow = losses(any_name, autocast=False), losses(any_name, autocast=True)
    assert wide[-50:].mean() < 0.7 * wide[:10].mean()  # it learns, and so there is something to follow
    windows, exact = (x.reshape(-1, 50).mean(1) for x in (narrow, wide))
    assert ((windows - exact).abs() / exact).max() < 0.02


# The largest scale of inputs: in float16 the largest whose products of three projections, which a scan forms, and
# their gate stay below 65504; the others have room for any that a network meets.
LARGEST = {torch.float32: 1e4, torch.bfloat16: 1e4, torch.float16: 4.0}


@pytest.mark.parametrize("dtype", LARGEST)
@settings(max_examples=12)
@given(
    share=st.sampled_from([0.0, 1e-8, 1e-4, 1e-2, 1.0]),
    dt=st.sampled_from([-30.0, -10.0, 0.0, 10.0, 30.0]),
    log_rate=st.sampled_from([-10.0, 0.0, 10.0]),
)
def test_extremes_stay_finite(any_name: str, dtype: torch.dtype, share: float, dt: float, log_rate: float) -> None:
    layer = mixer(any_name)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key in ("dt_bias", "dt_proj.bias"):
                parameter.fill_(dt)
            elif key in ("A_log", "log_A_real"):
                parameter.fill_(log_rate)
            elif key == "log_dt":
                parameter.fill_(dt / 3)  # its step is exp of it, and not softplus
    x = (LARGEST[dtype] * share * torch.randn(1, 20, WIDTH)).to(dtype).requires_grad_()
    y, state = layer.to(dtype)(x)
    y.float().mean().backward()
    for tensor in (y, *tree_leaves(state), x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert tensor.isfinite().all()
