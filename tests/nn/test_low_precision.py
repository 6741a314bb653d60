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
}
WIDTH = 16
KEPT = {"A_log", "D", "dt_bias", "dt_proj.bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}
KEPT_IN_S4D = {"log_A_real", "A_imag", "B", "C", "D", "log_dt"}


@pytest.fixture(params=OPTIONS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
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


def losses(name: str, autocast: bool) -> Tensor:
    torch.manual_seed(0)
    model = Delayed(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(300):
        x = torch.randn(8, 16, 1)
        target = torch.nn.functional.pad(x, (0, 0, 2, 0))[:, :-2]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        loss = (y.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.slow
def test_training_in_bfloat16_follows_float32_within_two_percent(name: str) -> None:
    wide, narrow = losses(name, autocast=False), losses(name, autocast=True)
    assert wide[-50:].mean() < 0.7 * wide[:10].mean()  # it learns, and so there is something to follow
    # Of the first loss: a loss near zero has no meaningful relative error.
    assert (narrow - wide).reshape(-1, 50).mean(1).abs().max() < 0.02 * wide[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10)
@given(
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    dt=st.sampled_from([-30.0, -10.0, 0.0, 10.0, 30.0]),
    log_rate=st.sampled_from([-10.0, 0.0, 10.0]),
)
def test_extremes_stay_finite(name: str, dtype: torch.dtype, scale: float, dt: float, log_rate: float) -> None:
    layer = mixer(name)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key in ("dt_bias", "dt_proj.bias"):
                parameter.fill_(dt)
            elif key in ("A_log", "log_A_real"):
                parameter.fill_(log_rate)
            elif key == "log_dt":
                parameter.fill_(dt / 3)  # its step is exp of it, and not softplus
    x = (scale * torch.randn(1, 20, WIDTH)).to(dtype).requires_grad_()
    y, state = layer.to(dtype)(x)
    y.float().mean().backward()
    for tensor in (y, *tree_leaves(state), x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert tensor.isfinite().all()
