"""The Mamba-3 mixer: parameters as in the public checkpoints, its equations by hand, precision, compilation."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.nn import Backbone, Mamba3, Mamba3State

SISO: dict[str, Any] = {"d_state": 8, "headdim": 4, "n_groups": 2}
MIMO: dict[str, Any] = {**SISO, "mimo_rank": 3}


def test_parameters_are_named_ordered_and_shaped_as_in_public_checkpoints() -> None:
    mixer = Mamba3(16, d_state=8, headdim=4, n_groups=2, mimo_rank=3, output_norm=True)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "dt_bias": (8,),
        "B_bias": (8, 3, 8),
        "C_bias": (8, 3, 8),
        "mimo_x": (8, 3, 4),
        "mimo_z": (8, 3, 4),
        "mimo_o": (8, 3, 4),
        "D": (8,),
        "in_proj.weight": (2 * 32 + 2 * 3 * 2 * 8 + 3 * 8 + 2, 16),  # z, x, B, C, dt, A, trap, 8 / 4 angles
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
    }
    assert [name for name, _ in Mamba3(16, **SISO).named_parameters()] == [
        "dt_bias",
        "B_bias",
        "C_bias",
        "D",
        "in_proj.weight",
        "B_norm.weight",
        "C_norm.weight",
        "out_proj.weight",
    ]


def test_a_whole_rotated_state_takes_twice_the_angles() -> None:
    half, whole = Mamba3(16, **SISO), Mamba3(16, **SISO, rope_fraction=1)
    assert whole.in_proj.out_features - half.in_proj.out_features == 2


def test_initial_values_are_those_of_the_paper() -> None:
    mixer = Mamba3(1024, d_state=4, headdim=4, mimo_rank=4, output_norm=True)
    for ones in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.mimo_z, mixer.B_norm.weight, mixer.norm.weight):
        assert (ones == 1).all()
    assert (mixer.mimo_x == 0.25).all()
    assert (mixer.mimo_o == 0.25).all()
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.2  # log-uniform around the geometric mean
    assert mixer.dt_bias._no_weight_decay
    assert mixer.D._no_weight_decay


def test_state_has_the_shapes_of_public_caches() -> None:
    _, state = Mamba3(16, **MIMO)(torch.randn(5, 3, 16))
    assert isinstance(state, Mamba3State)
    assert state.angle.shape == (5, 8, 2)
    assert state.ssm.shape == (5, 8, 4, 8)
    assert state.k.shape == (5, 3, 8, 8)
    assert state.v.shape == (5, 8, 4)


def by_hand(mixer: Mamba3, hidden: Tensor) -> Tensor:
    """The mixer's output for one sequence (length, d_model), from its weights and the equations alone."""
    w = dict(mixer.named_parameters())
    heads, rank, size = w["B_bias"].shape
    groups, inner = mixer.n_groups, w["out_proj.weight"].shape[1]
    headdim, pairs = inner // heads, int(size * mixer.rope_fraction) // 2
    widths = [inner, inner, rank * groups * size, rank * groups * size, heads, heads, heads, pairs]
    ends = list(itertools.accumulate(widths))
    ones = torch.ones(heads, rank, headdim, dtype=hidden.dtype)
    up, gate, down = (w.get(name, ones) for name in ("mimo_x", "mimo_z", "mimo_o"))
    first = [2 * i if rank == 1 else i for i in range(pairs)]
    second = [i + 1 if rank == 1 else i + size // 2 for i in first]

    def normed(vectors: Tensor, weight: Tensor) -> Tensor:
        return vectors / (vectors.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def keys(raw: Tensor, weight: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        """(heads, rank, state), turned."""
        vectors = normed(raw.view(rank, groups, size), weight)
        spread = torch.stack([vectors[:, h // (heads // groups)] for h in range(heads)]) + bias
        after = spread.clone()
        turned = torch.complex(spread[..., first], spread[..., second]) * torch.exp(1j * angle)[:, None]
        after[..., first], after[..., second] = turned.real, turned.imag
        return after

    angle = torch.zeros(heads, pairs, dtype=hidden.dtype)
    h = torch.zeros(heads, headdim, size, dtype=hidden.dtype)
    before = torch.zeros_like(h)
    outputs = []
    for row in hidden @ w["in_proj.weight"].T:
        z, x, B, C, dt, A, trap, angles = (row[end - width : end] for width, end in zip(widths, ends, strict=True))
        dt = F.softplus(dt + w["dt_bias"])
        if mixer.A_activation == "softplus":
            rate = F.softplus(A)
        else:
            rate = torch.stack([1 + a if a >= 0 else 1 / (1 - a) for a in A])
        a, weight = torch.exp(-rate.clamp(min=1e-4) * dt)[:, None, None], torch.sigmoid(trap)[:, None, None]
        angle = angle + math.pi * torch.tanh(angles) * dt[:, None]
        v = x.view(heads, 1, headdim) * up
        present = torch.einsum("hrp,hrn->hpn", v, keys(B, w["B_norm.weight"], w["B_bias"], angle))
        step = dt[:, None, None]
        h = a * h + (1 - weight) * step * a * before + weight * step * present
        y = torch.einsum("hpn,hrn->hrp", h, keys(C, w["C_norm.weight"], w["C_bias"], angle)) + w["D"][:, None, None] * v
        if "norm.weight" in w:
            y = normed(y, w["norm.weight"].view(heads, 1, headdim))
        y = y * F.silu(z.view(heads, 1, headdim) * gate) * down
        outputs.append(y.sum(1).flatten() @ w["out_proj.weight"].T)
        before = present
    return torch.stack(outputs)


@pytest.mark.parametrize("output_norm", [False, True])
@pytest.mark.parametrize("A_activation", ["softplus", "rational"])
@pytest.mark.parametrize("rope_fraction", [0.5, 1])
@pytest.mark.parametrize("sizes", [SISO, MIMO])
def test_mixer_is_its_equations(
    sizes: dict[str, Any], rope_fraction: float, A_activation: str, output_norm: bool
) -> None:
    mixer = Mamba3(
        16,
        **sizes,
        rope_fraction=rope_fraction,
        A_activation=A_activation,
        output_norm=output_norm,
        chunk_size=4,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for parameter in mixer.parameters():  # away from ones, so that none may be forgotten
            parameter += 0.5 * torch.randn_like(parameter)
    hidden = torch.randn(2, 11, 16, dtype=torch.float64)
    y, _ = mixer(hidden)
    for i in range(2):
        torch.testing.assert_close(y[i], by_hand(mixer, hidden[i]))


def test_both_activations_of_A_share_one_state_dict_and_differ() -> None:
    old, new = Mamba3(16, **SISO), Mamba3(16, **SISO, A_activation="rational")
    new.load_state_dict(old.state_dict())
    hidden = torch.randn(1, 9, 16)
    assert not torch.allclose(old(hidden)[0], new(hidden)[0])


@pytest.mark.parametrize("A_activation", ["softplus", "rational"])
def test_rate_is_bounded_and_its_gradient_finite(A_activation: str) -> None:
    mixer = Mamba3(16, **SISO, A_activation=A_activation)
    a = torch.tensor([-1e30, -1e6, -1.0, 0.0, 1.0, 1e6], requires_grad=True)
    rate = mixer._rate(a)
    (slope,) = torch.autograd.grad(rate.sum(), [a])
    assert rate.max() == -1e-4
    assert slope.isfinite().all()
    assert (slope <= 0).all()
    assert slope[3] < -0.4  # at zero softplus rises by 1/2, the other by 1


def test_float32_is_computed_in_float32() -> None:
    mixer = Mamba3(32, d_state=16, headdim=8)
    hidden = torch.randn(1, 64, 32)
    y, _ = mixer(hidden)
    exact, _ = mixer.double()(hidden.double())
    assert (y - exact).norm() / exact.norm() < 2e-6


def test_residuals_and_states_stay_float32_under_autocast() -> None:
    backbone = Backbone(16, 1, "mamba3", SISO)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = backbone.layers[0](torch.randn(1, 20, 16))
    assert y.dtype == torch.float32
    assert {state.angle.dtype, state.ssm.dtype, state.k.dtype} == {torch.float32}
    assert state.v.dtype == torch.bfloat16


def test_bfloat16_model_is_near_the_float32_one() -> None:
    mixer = Mamba3(32, d_state=16, headdim=8)
    hidden = torch.randn(1, 64, 32)
    exact, _ = mixer(hidden)
    y, state = mixer.bfloat16()(hidden.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert (y - exact).norm() / exact.norm() < 3e-2  # the weights are rounded as well


def test_step_is_the_layer_on_one_token() -> None:
    mixer = Mamba3(16, **MIMO)
    x = torch.randn(2, 3, 16)
    _, state = mixer(x[:, :2])
    y, after = mixer.step(x[:, 2], state)
    expected, expected_after = mixer(x[:, 2:], state)
    torch.testing.assert_close(y, expected[:, 0])
    for a, b in zip(after, expected_after, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_whole_and_equal() -> None:
    mixer = Mamba3(16, **SISO)
    x = torch.randn(2, 20, 16)
    y, _ = mixer(x)
    grads = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
    y_compiled, _ = torch.compile(mixer, fullgraph=True)(x)
    torch.testing.assert_close(y_compiled, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y_compiled.square().sum(), list(mixer.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 20]])
def test_traced_whole_with_ranks_and_packs(bounds: list[int] | None) -> None:
    mixer = Mamba3(16, **MIMO)
    x, cu_seqlens = torch.randn(1, 20, 16), None if bounds is None else torch.tensor(bounds)
    _, before = mixer(x, cu_seqlens=cu_seqlens)
    traced = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, state = mixer(x, before, cu_seqlens=cu_seqlens)
    y_traced, state_traced = traced(x, before, cu_seqlens=cu_seqlens)
    for a, b in zip((y_traced, *state_traced), (y, *state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": 5}, "headdim must divide expand"),
        ({"n_groups": 3}, "n_groups must divide the 8 heads"),
        ({"rope_fraction": 0.7}, "rope_fraction must be 0.5 or 1"),
        ({"mimo_rank": 0}, "mimo_rank must be at least 1"),
        ({"A_activation": "relu"}, "A_activation must be one of softplus, rational"),
        ({"d_state": 2}, "d_state must be even and leave an angle"),
        ({"d_state": 7}, "d_state must be even and leave an angle"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3(16, **{**SISO, **change})
