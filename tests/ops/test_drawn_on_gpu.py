"""The GPU's kernels against the definition on inputs drawn at random: sizes that fill blocks and that don't, on a GPU.

What tests elsewhere choose by hand meets the interpreter, which has no registers, no alignment and no tensor cores.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.ops import test_causal_conv1d, test_mamba3_scan, test_selective_scan, test_ssd
from tests.ops.agreement import assert_close, compared
from torch import Tensor

from mambakit.ops import causal_conv1d, selective_scan, ssd

pytestmark = pytest.mark.gpu

_DRAWS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)

Drawn = tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor | None]]


class Draw(random.Random):
    """Numbers drawn from a seed, and what has its turn with it, so that seeds side by side miss nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._seed = seed

    def turn(self, options: Sequence[Any]) -> Any:
        return options[self._seed % len(options)]


def sizes(draw: Draw) -> dict[str, Any]:
    """What all operations are made of; one in three of them a pack of three sequences, one of them empty."""
    length = draw.choice((1, 7, 16, 33, 64, 65, 150, 257))
    sizes: dict[str, Any] = {"length": length, "dtype": draw.turn(DTYPES), "optional": draw.random() < 0.6}
    if draw.random() < 1 / 3 and length > 1:
        cut = draw.randrange(length)
        return {**sizes, "batch": 1, "sequences": 3, "cu_seqlens": torch.tensor([0, cut, cut, length])}
    return {**sizes, "batch": draw.choice((1, 2, 3))}


def draw_ssd(draw: Draw) -> Drawn:
    drawn, groups = sizes(draw), draw.choice((1, 1, 2))
    bounds, chunk = drawn.pop("cu_seqlens", None), draw.choice((16, 32, 64, None))
    headdim, state = draw.turn((64, 24, 32, 128, 40, 80, 8)), draw.choice((8, 16, 32, 48, 64, 128, 200, 256))
    made = test_ssd.make(heads=groups * draw.choice((1, 3, 4)), headdim=headdim, state=state, groups=groups, **drawn)

    def run(**tensors: Any) -> tuple[Tensor, ...]:
        return ssd(**tensors, dt_softplus=True, return_final_state=True, chunk_size=chunk)

    return run, {**made, "cu_seqlens": bounds}


def draw_selective_scan(draw: Draw) -> Drawn:
    drawn, groups = sizes(draw), draw.choice((1, 1, 2))
    bounds = drawn.pop("cu_seqlens", None)
    dim, state = groups * draw.choice((5, 32, 48, 128, 200)), draw.turn((16, 8, 64, 3, 32, 128, 1))
    made = test_selective_scan.make(dim=dim, state=state, groups=groups, **drawn)

    def run(**tensors: Any) -> tuple[Tensor, ...]:
        return selective_scan(**tensors, delta_softplus=True, return_final_state=True)

    return run, {**made, "cu_seqlens": bounds}


def draw_causal_conv1d(draw: Draw) -> Drawn:
    drawn, width = sizes(draw), draw.turn((4, 2, 7, 1, 16, 3, 4))
    bounds, sequences = drawn.pop("cu_seqlens", None), drawn.pop("sequences", None)
    made = test_causal_conv1d.make(channels=draw.choice((1, 30, 64, 200, 256, 1000)), width=width, **drawn)
    if sequences is not None and drawn["optional"]:
        made["initial_state"] = torch.randn(sequences, *made["initial_state"].shape[1:]).to(drawn["dtype"])
    activation = draw.choice((None, "silu"))

    def run(**tensors: Any) -> tuple[Tensor, ...]:
        return causal_conv1d(**tensors, activation=activation, return_final_state=True)

    return run, {**made, "cu_seqlens": bounds}


def draw_mamba3_scan(draw: Draw) -> Drawn:
    drawn, rank = sizes(draw), draw.choice((None, None, 2, 4))
    bounds, state = drawn.pop("cu_seqlens", None), draw.choice((8, 32, 50, 64, 128))
    chunk, interleaved = draw.choice((16, 64)), draw.random() < 0.5
    pairs = draw.choice((1, state // 4, state // 2))
    heads, headdim = draw.choice((1, 3, 8)), draw.turn((64, 32, 70, 8, 64))
    made = test_mamba3_scan.make(heads=heads, headdim=headdim, state=state, rank=rank, pairs=pairs, **drawn)

    def run(**tensors: Any) -> tuple[Tensor, ...]:
        return test_mamba3_scan.scan(**tensors, chunk_size=chunk, interleaved=interleaved)

    return run, {**made, "cu_seqlens": bounds}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("operation", [draw_ssd, draw_selective_scan, draw_causal_conv1d, draw_mamba3_scan])
def test_drawn_inputs_agree_with_the_reference(operation: Callable[[Draw], Drawn], seed: int) -> None:
    """Held together over a few draws of numbers: the gradient of A is a sum for every head, of which one in thirty in
    half precision cancels to so little that its rounding seems large."""
    found: dict[tuple[str, bool], list[tuple[Tensor, Tensor]]] = {}
    for _ in range(_DRAWS):
        run, tensors = operation(Draw(seed))  # the same sizes each time
        dtype = tensors[next(iter(tensors))].dtype
        given = {name: t for name, t in tensors.items() if t is not None}
        for name, got, expected, is_gradient in compared(run, given, "triton"):
            found.setdefault((name, is_gradient), []).append((got.detach(), expected.detach()))
    for (name, is_gradient), pairs in found.items():
        got, expected = (torch.stack(part) for part in zip(*pairs, strict=True))
        assert_close(name, got, expected, dtype, is_gradient)
