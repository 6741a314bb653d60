"""The scan of Mamba-3 beside torchmamba's, an implementation by others; it needs Python 3.12 or newer.

There the step is part of what it is given: its inputs are ours with dt = 1.
"""

import math
from typing import Any

import pytest
import torch
from tests.ops.agreement import error
from torch import Tensor

from mambakit.ops import mamba3_scan

torchmamba: Any = pytest.importorskip("torchmamba", reason="torchmamba (Python >= 3.12) is not installed")
BACKENDS = ["cpu", "portable", "reference"]
BATCH, LENGTH, HEADS, HEADDIM, STATE, GROUPS, RANK = 2, 23, 4, 3, 8, 2, 3


def make(*ranks: int) -> dict[str, Tensor]:
    """Inputs of our scan in float64; each head turns by angles of its own, all pairs of them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, *shape, dtype=torch.float64)

    return {
        "x": normal(HEADS, HEADDIM),
        "dt": torch.ones(BATCH, LENGTH, HEADS, dtype=torch.float64),
        "A": -normal(HEADS).abs(),
        "B": normal(*ranks, GROUPS, STATE),
        "C": normal(*ranks, GROUPS, STATE),
        "trap": normal(HEADS),
        "angles": normal(HEADS, STATE // 2),
    }


def ours(tensors: dict[str, Tensor], backend: str, **given: Any) -> tuple[Tensor, Tensor]:
    y, state = mamba3_scan(**tensors, **given, chunk_size=8, return_final_state=True, backend=backend)
    return y, state.ssm


def assert_equal_with_gradients(
    mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], leaves: list[Tensor]
) -> None:
    weights = [torch.randn_like(t) for t in mine]
    found = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (mine, theirs)
    ]
    for a, b in zip((*mine, *found[0]), (*theirs, *found[1]), strict=True):
        assert error(a, b) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_siso_scan_and_its_gradients_are_those_of_torchmamba(backend: str) -> None:
    t = {name: x.requires_grad_(name != "dt") for name, x in make().items()}
    theta, weight = math.pi * torch.tanh(t["angles"]), torch.sigmoid(t["trap"])
    y, h, *_ = torchmamba.trap_rope_loop(t["x"], t["A"], t["B"], t["C"], theta, weight)
    leaves = [x for name, x in t.items() if name != "dt"]
    assert_equal_with_gradients(ours(t, backend), (y, h.mT), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mimo_scan_and_its_gradients_are_those_of_torchmamba(backend: str) -> None:
    t = {name: x.requires_grad_(name != "dt") for name, x in make(RANK).items()}
    up = torch.randn(HEADS, RANK, HEADDIM, dtype=torch.float64).requires_grad_()
    theta, weight = math.pi * torch.tanh(t["angles"]), torch.sigmoid(t["trap"])
    v = (t["x"].unsqueeze(2) * up.transpose(0, 1)).permute(0, 1, 3, 4, 2)  # (batch, length, heads, headdim, rank)
    B, C = (t[name].permute(0, 1, 3, 4, 2) for name in ("B", "C"))  # (batch, length, groups, state, rank)
    y, h, *_ = torchmamba.mimo_loop(v, t["A"], B, C, theta, weight)
    leaves = [up, *(x for name, x in t.items() if name != "dt")]
    mine = ours(t, backend, mimo_x=up, interleaved=True)
    assert_equal_with_gradients(mine, (y.permute(0, 1, 4, 2, 3), h.mT), leaves)
