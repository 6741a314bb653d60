"""A step of a whole mixer in the GPU's fused kernels gives what its operations give."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.ops.backends import DEVICE, TRITON
from torch import nn

from mambakit.nn import Block, Mamba, Mamba2
from mambakit.nn.step_products import goes_by_step
from mambakit.ops import decode

LAYERS: dict[str, Any] = {
    "mamba": lambda: Mamba(12, d_state=5, d_conv=3),
    "mamba of one tap": lambda: Mamba(8, d_state=4, d_conv=1, conv_bias=False),
    "mamba2": lambda: Mamba2(12, d_state=5, headdim=6, n_groups=2),
    "mamba2 without norm": lambda: Mamba2(16, d_state=4, headdim=32, rmsnorm=False, D_has_hdim=True),
    "mamba2 with bounds": lambda: Mamba2(8, d_state=4, headdim=8, d_conv=2, dt_limit=(0.01, 0.02)),
}


@pytest.fixture(autouse=True)
def _on_the_device_of_the_kernels() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


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


@pytest.mark.parametrize("make", [lambda: Mamba(8, d_state=4), lambda: Mamba2(8, d_state=4, headdim=8)])
def test_a_hook_in_a_mixer_is_not_passed_by(make: Any) -> None:
    for part in ("", "conv1d"):
        mixer = make()
        assert mixer.steps_with_residual()
        mixer.get_submodule(part).register_forward_hook(lambda *_: None)
        assert not mixer.steps_with_residual()
    for part in ("in_proj", "out_proj"):
        mixer = make()
        mixer.get_submodule(part).register_forward_hook(lambda *_: None)
        assert mixer.steps_with_residual()  # which calls it
        assert not goes_by_step(mixer.get_submodule(part), 1)


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


BLOCKS: dict[str, Any] = {
    **LAYERS,
    "mamba with biases": lambda: Mamba(12, d_state=5, bias=True),
    "mamba2 normed before its gate": lambda: Mamba2(16, d_state=4, headdim=8, norm_before_gate=True, bias=True),
    "mamba2 with one group": lambda: Mamba2(12, d_state=5, headdim=6),
}


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
# With few rows a product takes an output a program, several with more rows, and tiles with many (and outputs).
@pytest.mark.parametrize(("rows", "chosen"), [(1, {}), (3, {"_LEAST_PROGRAMS": 4}), (20, {"_NARROW": 0}), (70, {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_step_of_a_block_is_what_its_modules_give(
    name: str, dtype: torch.dtype, rows: int, chosen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, value in chosen.items():
        monkeypatch.setattr(f"mambakit.ops.triton.decode_linear.{limit}", value)
    mixer = BLOCKS[name]()
    block = Block(mixer, mixer.d_model, d_intermediate=6)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    block = block.to(dtype)
    start, x = torch.randn(rows, 5, mixer.d_model), torch.randn(rows, 1, mixer.d_model)
    monkeypatch.setattr(decode, "serves", lambda *_: False)
    _, state = block(start)
    expected, last = block(x, state)
    monkeypatch.setattr(decode, "serves", lambda x, *_: x.shape[1] == 1)
    called: list[str] = []
    for part in ("in_proj", "out_proj"):
        product = mixer.get_submodule(part)
        monkeypatch.setattr(product, "forward", lambda x, part=part, run=product.forward: called.append(part) or run(x))
    assert mixer.steps_with_residual()
    y, after = block(x, state)
    bound = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(y, expected, **bound)
    torch.testing.assert_close(tuple(after), tuple(last), **bound)
    most = 4 if dtype == torch.float32 else 64
    assert called == ["in_proj"] * (rows > 3) + ["out_proj"] * (rows > most)
