"""What is promised of a GPU's kernels in whole layers: long sequences, numbers at the edge, the same bits each time.

Those that a CPU keeps as well are tried on it too.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mambakit.nn import Backbone, Mamba, Mamba2, Mamba3

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
WIDTH = 16

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: Mamba(WIDTH, d_state=8),
    "mamba2": lambda: Mamba2(WIDTH, d_state=16, headdim=16),
    "mamba3": lambda: Mamba3(WIDTH, d_state=16, headdim=16),
    "mamba3 mimo": lambda: Mamba3(WIDTH, d_state=16, headdim=16, mimo_rank=2),
}


@pytest.fixture(params=MIXERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return MIXERS[request.param]()


def error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; infinite for a NaN."""
    ratio = ((got.double() - expected).norm() / expected.norm()).item()
    return ratio if ratio == ratio else float("inf")


@pytest.mark.gpu
@torch.no_grad()
def test_a_million_steps_are_those_of_chunks_in_float64(layer: nn.Module) -> None:
    layer = layer.cuda()
    length, chunk = 1_000_000, 50_000
    x = torch.randn(1, length, WIDTH, device="cuda")
    y, last = layer(x)
    double, state = copy.deepcopy(layer).double(), None
    for part, found in zip(x.double().split(chunk, dim=1), y.split(chunk, dim=1), strict=True):
        expected, state = double(part, state)
        assert found.isfinite().all()
        assert error(found, expected) < 1e-4
    for got, expected in zip(tree_leaves(last), tree_leaves(state), strict=True):
        if got.is_floating_point():
            assert error(got, expected) < 1e-3


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_gone_wrong_stays_in_its_sequence(layer: nn.Module, bad: float, device: str) -> None:
    layer = layer.to(device)
    x = torch.randn(3, 90, WIDTH, device=device)
    ill = x.clone()
    ill[1, 40] = bad
    ill, x = ill.requires_grad_(), x.requires_grad_()
    y, state = layer(ill)
    expected, expected_state = layer(x)
    others = [0, 2]
    assert not y[1, 40:].isfinite().all()
    if device == "cpu":  # a GPU's products of chunks carry it to earlier steps of its chunk as well
        assert torch.equal(y[1, :40], expected[1, :40])
    assert torch.equal(y[others], expected[others])
    for got, healthy in zip(tree_leaves(state), tree_leaves(expected_state), strict=True):
        assert torch.equal(got[others], healthy[others])
    (grad,) = torch.autograd.grad(y.sum(), ill)
    (healthy_grad,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(grad[others], healthy_grad[others])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_number_gone_wrong_stays_in_its_sequence_of_a_pack(layer: nn.Module, device: str) -> None:
    layer = layer.to(device)
    bounds = [0, 37, 64, 130, 131, 200]
    x = torch.randn(1, 200, WIDTH, device=device)
    pack = torch.tensor(bounds, device=device, dtype=torch.int32)
    expected, expected_state = layer(x, cu_seqlens=pack)
    ill = x.clone()
    ill[0, 63] = float("nan")  # the last step of the second
    y, state = layer(ill, cu_seqlens=pack)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if index != 1:
            assert torch.equal(y[:, start:end], expected[:, start:end])
            for got, healthy in zip(tree_leaves(state), tree_leaves(expected_state), strict=True):
                assert torch.equal(got[index], healthy[index])
    assert not y[:, 63].isfinite().all()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("step_bias", [-200.0, 200.0])
@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_steps_at_either_end_give_finite_numbers(layer: nn.Module, scale: float, step_bias: float, device: str) -> None:
    bias: Any = getattr(layer, "dt_bias", None)
    with torch.no_grad():
        (layer.dt_proj.bias if bias is None else bias).fill_(step_bias)  # type: ignore[union-attr]
    layer = layer.to(device)
    x = (scale * torch.randn(2, 150, WIDTH, device=device)).requires_grad_()
    y, state = layer(x)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.sum(), leaves)
    for part in (y, *tree_leaves(state), *grads):
        assert part.isfinite().all()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_a_training_step_gives_the_same_bits_each_time(mixer: str, dtype: torch.dtype, device: str) -> None:
    options = {} if mixer == "mamba" else {"headdim": 16}
    backbone = Backbone(32, 2, mixer, {"d_state": 16, **options}).to(device, dtype)
    x = torch.randn(3, 700, 32, device=device)
    runs = []
    for _ in range(2):
        y, state = backbone(x)
        loss = y.float().square().mean() + sum(part.float().square().mean() for part in tree_leaves(state))
        runs.append([y.detach(), *torch.autograd.grad(loss, list(backbone.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
