"""Many models in one call: torch.vmap over an operation gives what each model gives alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.agreement import error
from tests.ops.backends import BACKENDS, DEVICE, TRITON
from torch import Tensor

from mambakit import ops
from mambakit.ops import dispatch

MODELS = 3
BATCH, LENGTH, STATE = 2, 37, 4

Case = tuple[Callable[..., Any], dict[str, Tensor]]


def scan() -> Case:
    dim, groups = 6, 2
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (BATCH, LENGTH, dim)),
        **dict.fromkeys(("B", "C"), (BATCH, LENGTH, groups, STATE)),
        "A": (dim, STATE),
        "D": (dim,),
        "delta_bias": (dim,),
        "initial_state": (BATCH, dim, STATE),
    }
    return with_negative_A(ops.selective_scan, delta_softplus=True, return_final_state=True), drawn(shapes)


def convolution() -> Case:
    shapes = {"x": (BATCH, LENGTH, 5), "weight": (5, 4), "bias": (5,), "initial_state": (BATCH, 3, 5)}
    return lambda **t: ops.causal_conv1d(**t, activation="silu", return_final_state=True), drawn(shapes)


def ssd() -> Case:
    heads, headdim, groups = 4, 3, 2
    shapes = {
        **dict.fromkeys(("x", "z"), (BATCH, LENGTH, heads, headdim)),
        **dict.fromkeys(("B", "C"), (BATCH, LENGTH, groups, STATE)),
        "dt": (BATCH, LENGTH, heads),
        "A": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "initial_state": (BATCH, heads, headdim, STATE),
    }
    return with_negative_A(ops.ssd, dt_softplus=True, return_final_state=True, chunk_size=16), drawn(shapes)


def mamba3(rank: int) -> Case:
    heads, headdim, groups = 4, 3, 2
    ranks = (rank,) if rank > 1 else ()
    shapes = {
        **dict.fromkeys(("x", "z"), (BATCH, LENGTH, heads, headdim)),
        **dict.fromkeys(("dt", "A", "trap"), (BATCH, LENGTH, heads)),
        **dict.fromkeys(("B", "C"), (BATCH, LENGTH, *ranks, groups, STATE)),
        "angles": (BATCH, LENGTH, STATE // 2),  # shared by the heads
        **dict.fromkeys(("D", "dt_bias"), (heads,)),
        **dict.fromkeys(("B_bias", "C_bias"), (heads, rank, STATE)),
    }
    if rank > 1:
        shapes |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (heads, rank, headdim))

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        tensors["A"] = -tensors["A"].abs()
        y, state = ops.mamba3_scan(**tensors, dt_softplus=True, return_final_state=True, chunk_size=16)
        return y, *state

    return run, drawn(shapes)


def with_negative_A(operation: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return lambda **tensors: operation(**{**tensors, "A": -tensors["A"].abs()}, **settings)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(MODELS, *shape, dtype=torch.float64) for name, shape in shapes.items()}


CASES = {
    "selective_scan": scan,
    "causal_conv1d": convolution,
    "ssd": ssd,
    "mamba3_scan": lambda: mamba3(1),
    "mamba3_scan of several ranks": lambda: mamba3(2),
}


@pytest.fixture(params=[backend for backend in BACKENDS if backend in ("cpu", "portable")])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MAMBAKIT_BACKEND", request.param)
    if dispatch.refusal(request.param, torch.device("cpu")):
        pytest.skip("this backend is not here")
    return request.param


def each_alone(run: Callable[..., Any], tensors: dict[str, Tensor]) -> list[Tensor]:
    results = [run(**{name: t[index] for name, t in tensors.items()}) for index in range(MODELS)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def gradients(outputs: list[Tensor] | tuple[Tensor, ...], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    loss = sum((output * torch.randn(output.shape, dtype=output.dtype)).sum() for output in outputs)
    return torch.autograd.grad(loss, list(tensors.values()))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_models_in_one_call_give_what_each_gives_alone(case: str, backend: str) -> None:
    run, tensors = CASES[case]()
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    together = torch.vmap(lambda t: run(**t))(tensors)
    alone = each_alone(run, tensors)
    for ours, theirs in zip(together, alone, strict=True):
        assert error(ours, theirs) < 1e-12
    for name, ours, theirs in zip(tensors, gradients(together, tensors), gradients(alone, tensors), strict=True):
        assert error(ours, theirs) < 1e-12, name


def test_an_input_that_all_models_share_is_given_to_each() -> None:
    run, tensors = ssd()
    shared = {**tensors, "x": tensors["x"][:1].expand_as(tensors["x"])}
    in_dims = {name: None if name == "x" else 0 for name in tensors}
    together = torch.vmap(lambda t: run(**t), in_dims=(in_dims,))({**tensors, "x": tensors["x"][0]})
    for ours, theirs in zip(together, each_alone(run, shared), strict=True):
        assert error(ours, theirs) < 1e-12


def test_packs_that_differ_between_models_are_refused() -> None:
    run, tensors = convolution()
    tensors = {name: t[:, :1] if name in ("x",) else t for name, t in tensors.items() if name != "initial_state"}
    packs = torch.tensor([[0, 3, LENGTH], [0, 4, LENGTH], [0, 5, LENGTH]])
    with pytest.raises(ValueError, match="cu_seqlens must be the same for all models"):
        torch.vmap(lambda t, pack: run(**t, cu_seqlens=pack))(tensors, packs)


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
@pytest.mark.parametrize("shared", [False, True])
def test_norms_of_many_models_are_one_launch(shared: bool) -> None:
    shapes = {"x": (2, 5, 12), "z": (2, 5, 12), "weight": (12,)}
    tensors = {name: torch.randn(MODELS, *shape, device=DEVICE) for name, shape in shapes.items()}
    if shared:
        tensors["x"] = tensors["x"][:1].expand_as(tensors["x"])
    tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def run(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        plain = ops.rms_norm(tensors["x"], tensors["weight"], groups=3, backend="triton")
        return plain, ops.gated_rms_norm(**tensors, groups=2, norm_before_gate=True, backend="triton")

    dims = {name: None if shared and name == "x" else 0 for name in tensors}
    given = {name: t[0] if dims[name] is None else t for name, t in tensors.items()}
    together = torch.vmap(lambda t: run(**t), in_dims=(dims,))(given)
    alone = each_alone(run, tensors)
    for ours, theirs in zip(together, alone, strict=True):
        assert error(ours, theirs) < 1e-6
    loss, expected = (sum(part.sin().sum() for part in parts) for parts in (together, alone))
    found = torch.autograd.grad(loss, list(tensors.values()))  # type: ignore[arg-type]
    wanted = torch.autograd.grad(expected, list(tensors.values()))  # type: ignore[arg-type]
    for name, ours, theirs in zip(tensors, found, wanted, strict=True):
        ours, theirs = (t.sum(0) if dims[name] is None else t for t in (ours, theirs))
        assert error(ours, theirs) < 1e-5, name


@pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")
@pytest.mark.parametrize("length", [6, 18])
def test_scans_of_many_models_of_mamba3_are_one_launch_of_each_kernel(length: int) -> None:
    _, tensors = CASES["mamba3_scan"]()
    along = ("x", "z", "dt", "A", "trap", "B", "C", "angles")
    tensors = {
        name: (t[:, :, :length] if name in along else t).to(DEVICE, torch.float32).requires_grad_()
        for name, t in tensors.items()
    }

    def on_triton(**given: Tensor) -> Tensor:
        given["A"] = -given["A"].abs()
        y: Tensor = ops.mamba3_scan(**given, dt_softplus=True, backend="triton")
        return y

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own vmap of an operator warns that it is slow
        together = torch.vmap(lambda t: on_triton(**t))(tensors)
    alone = torch.stack([on_triton(**{name: t[index] for name, t in tensors.items()}) for index in range(MODELS)])
    assert error(together, alone) < 1e-6
    for name, ours, theirs in zip(tensors, gradients([together], tensors), gradients([alone], tensors), strict=True):
        assert error(ours, theirs) < 1e-5, name
