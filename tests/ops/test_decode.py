"""A step of a whole mixer in the GPU's fused kernels gives what its operations give."""

from typing import Any

import pytest
import torch
from tests.ops.backends import DEVICE, TRITON
from torch import nn

from mambakit.nn import Mamba, Mamba2
from mambakit.ops import decode

LAYERS: dict[str, Any] = {
    "mamba": lambda: Mamba(12, d_state=5, d_conv=3),
    "mamba of one tap": lambda: Mamba(8, d_state=4, d_conv=1, conv_bias=False),
    "mamba2": lambda: Mamba2(12, d_state=5, headdim=6, n_groups=2),
    "mamba2 without norm": lambda: Mamba2(16, d_state=4, headdim=32, rmsnorm=False, D_has_hdim=True),
    "mamba2 with bounds": lambda: Mamba2(8, d_state=4, headdim=8, d_conv=2, dt_limit=(0.01, 0.02)),
}


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_fused_steps_give_what_the_operations_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: nn.Module = LAYERS[name]()
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # no parameter keeps a value at which its use is not seen
    start, steps = torch.randn(3, 7, layer.d_model), torch.randn(3, 4, layer.d_model)
    monkeypatch.setattr(decode, "serves", lambda *_: False)
    _, state = layer(start)
    expected, last = layer(steps, state)
    monkeypatch.setattr(decode, "serves", lambda x, *_: x.shape[1] == 1)
    for t in range(4):
        before = [part.clone() for part in state]
        y, after = layer(steps[:, t : t + 1], state)
        torch.testing.assert_close(y[:, 0], expected[:, t], atol=1e-5, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))  # states are not changed in place
        state = after
    torch.testing.assert_close(tuple(state), tuple(last), atol=1e-5, rtol=1e-4)


def test_only_steps_on_a_gpu_without_gradients_are_fused() -> None:
    layer, x = Mamba(8, d_state=4), torch.randn(1, 1, 8)
    _, state = layer(x)
    with torch.no_grad():
        assert decode.serves(x, state, None, layer.parameters()) == (DEVICE == "cuda")
        assert not decode.serves(x, None, None, layer.parameters())
        assert not decode.serves(torch.randn(1, 2, 8), state, None, layer.parameters())
    assert not decode.serves(x, state, None, layer.parameters())


def test_an_adapter_in_place_of_a_projection_takes_part_in_steps() -> None:
    layer = Mamba(8, d_state=4)
    assert layer._has_plain_steps()
    layer.dt_proj.register_forward_hook(lambda *_: None)
    assert not layer._has_plain_steps()


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_states_in_place_are_the_next_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[name]()
    _, state = layer(torch.randn(2, 5, layer.d_model))
    x = torch.randn(2, 1, layer.d_model)
    monkeypatch.setattr(decode, "serves", lambda *_: True)
    y, after = layer(x, state)
    with decode.states_in_place():
        again, same = layer(x, state)
    assert torch.equal(again, y)
    assert same.ssm is state.ssm
    assert torch.equal(state.ssm, after.ssm)
    assert torch.equal(same.conv, after.conv)
