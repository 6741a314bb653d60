"""S4D: recurrence, convolution and continuous time agree; discretisation errors have their orders; initial modes."""

import math

import pytest
import torch
from torch import Tensor

from mambakit.nn import S4D, Backbone, hippo_legs
from mambakit.nn.s4d import DISCRETISATIONS, INITS


def modes(layer: S4D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, C (d_model, d_state / 2) complex and dt (d_model, 1)."""
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    return A, torch.view_as_complex(layer.B), torch.view_as_complex(layer.C), layer.log_dt.exp()[:, None]


def recurrence(layer: S4D, u: Tensor) -> Tensor:
    """2 Re(C h) (length, d_model) step by step, from the discretisation's textbook formulas."""
    A, B, C, dt = modes(layer)
    if layer.discretisation == "zoh":
        Ab = torch.exp(dt * A)
        Bb = (Ab - 1) / A * B
    else:
        Ab, Bb = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
    h, y = torch.zeros_like(A), []
    for u_t in u:
        h = Ab * h + Bb * u_t[:, None]
        y.append(2 * (C * h).sum(-1).real)
    return torch.stack(y)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
def test_recurrence_is_convolution_with_the_kernel(discretisation: str, init: str) -> None:
    layer = S4D(3, 8, discretisation, init, dtype=torch.float64)
    u = torch.randn(50, 3, dtype=torch.float64)
    K = layer.kernel(50)
    expected = recurrence(layer, u)
    for t in range(50):
        torch.testing.assert_close((K[:, : t + 1].flip(1) * u[: t + 1].t()).sum(1), expected[t], rtol=1e-8, atol=1e-10)


def test_layer_is_glu_of_the_projected_gelu_of_the_recurrence() -> None:
    layer = S4D(3, 8, dtype=torch.float64)
    u = torch.randn(1, 50, 3, dtype=torch.float64)
    pre = recurrence(layer, u[0]) + layer.D * u[0]
    expected = torch.nn.functional.glu(layer.out_proj(torch.nn.functional.gelu(pre)))
    torch.testing.assert_close(layer(u)[0][0], expected)


def test_zoh_is_exact_for_an_input_held_between_steps() -> None:
    """One step with u held is the exponential of the dense [[A, B], [0, 0]] dt applied to [h, u]."""
    layer = S4D(1, 8, "zoh", dtype=torch.float64)
    A, B, _, dt = modes(layer)
    n = A.shape[1]
    dense = torch.zeros(n + 1, n + 1, dtype=torch.complex128)
    dense[:n, :n], dense[:n, n] = torch.diag(A[0]), B[0]
    h = torch.randn(n, dtype=torch.complex128)
    expected = (torch.linalg.matrix_exp(dense * dt[0]) @ torch.cat([h, torch.ones(1)]))[:n]
    log_Ab, Bb = layer.discretised()
    torch.testing.assert_close(torch.exp(log_Ab[0]) * h + Bb[0], expected)


@pytest.mark.parametrize(("discretisation", "order"), [("zoh", 1), ("bilinear", 2)])
def test_discretisation_error_has_its_order(discretisation: str, order: int) -> None:
    """For h' = A h + cos(t), with the bilinear rule fed the mean of neighbouring inputs as its derivation asks."""
    errors = []
    for steps in (400, 800):
        layer = S4D(1, 2, discretisation, dtype=torch.float64)
        dt = 4.0 / steps
        with torch.no_grad():
            layer.log_dt.fill_(math.log(dt))
            layer.A_imag.fill_(1.5)
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)[0, 0]
        u = torch.cos(torch.arange(steps + 1, dtype=torch.float64) * dt)
        u = u[:-1] if discretisation == "zoh" else (u[:-1] + u[1:]) / 2
        log_Ab, Bb = layer.discretised()
        h = torch.zeros((), dtype=torch.complex128)
        for u_t in u:
            h = torch.exp(log_Ab[0, 0]) * h + Bb[0, 0] * u_t
        # h(T) = int_0^T exp(A (T - s)) cos(s) ds
        waves = (torch.exp(A * 4.0) - torch.exp(torch.tensor(sign * 4j)) for sign in (1, -1))
        exact = sum(wave / (A - sign * 1j) for wave, sign in zip(waves, (1, -1), strict=True)) / 2
        errors.append((h - exact).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_initial_modes_are_those_of_the_paper() -> None:
    def A(init: str) -> Tensor:
        return modes(S4D(1, 8, init=init, dtype=torch.float64))[0][0]

    n = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(A("lin"), torch.complex(torch.full_like(n, -0.5), math.pi * n))
    torch.testing.assert_close(A("real"), torch.complex(-(n + 1), torch.zeros_like(n)))
    torch.testing.assert_close(A("inv").imag, 8 / math.pi * (8 / (2 * n + 1) - 1))
    legs, _ = hippo_legs(8)
    P = torch.sqrt(torch.arange(8, dtype=torch.float64) + 0.5)
    eigenvalues = torch.linalg.eigvals(legs + P[:, None] * P)
    torch.testing.assert_close(A("legs").imag.sort()[0], eigenvalues.imag.sort()[0][4:])
    torch.testing.assert_close(A("legs").real, torch.full_like(n, -0.5))


def test_hippo_legs_holds_the_legendre_coefficients_of_a_constant() -> None:
    """The coefficients of u = 1 are (1, 0, 0, ..), at which h' = (A h + B u) / t stands still."""
    A, B = hippo_legs(6)
    torch.testing.assert_close(A @ torch.eye(6, dtype=torch.float64)[0] + B, torch.zeros(6, dtype=torch.float64))


def test_legs_modes_reproduce_the_normal_part_of_hippo() -> None:
    """The response of 2 Re over half the modes is that of the whole real system of A + P P^T, entered through B."""
    A, B, _, _ = modes(S4D(1, 8, init="legs", dtype=torch.float64))
    legs, entry = hippo_legs(8)
    P = torch.sqrt(torch.arange(8, dtype=torch.float64) + 0.5)
    for t in (0.0, 0.1, 1.0):
        energy = (torch.linalg.matrix_exp((legs + P[:, None] * P) * t) @ entry).square().sum()
        torch.testing.assert_close(2 * (torch.exp(A * t) * B).abs().square().sum(), energy)


def test_no_tensor_of_channels_times_states_times_length_is_kept() -> None:
    layer = S4D(8, 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(1, 4096, 8))
    assert max(kept) < 8 * 16 * 4096 / 4


def test_bfloat16_in_and_out_with_a_float32_state() -> None:
    layer = S4D(8, 4, dtype=torch.bfloat16)
    y, state = layer(torch.randn(2, 20, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert state.ssm.shape == (2, 8, 2, 2)


def test_a_pack_of_no_sequences() -> None:
    y, state = S4D(8, 4)(torch.randn(1, 0, 8), cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 8)
    assert state.ssm.shape == (0, 8, 2, 2)


def test_step_is_the_layer_on_one_token() -> None:
    layer = S4D(8, 4)
    x = torch.randn(2, 3, 8)
    _, state = layer(x[:, :2])
    y, after = layer.step(x[:, 2], state)
    torch.testing.assert_close(y, layer(x)[0][:, 2])
    torch.testing.assert_close(after.ssm, layer(x)[1].ssm)


def test_compiled_whole_and_equal() -> None:
    backbone = Backbone(8, 1, "s4d", {"d_state": 4})
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")  # inductor leaves complex numbers to eager
    x = torch.randn(2, 20, 8)
    y, state = compiled(x)
    torch.testing.assert_close(y, backbone(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, state)[0], backbone(x, state)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_state": 5}, "d_state must be even"),
        ({"discretisation": "euler"}, "discretisation must be one of zoh, bilinear"),
        ({"init": "hippo"}, "init must be one of lin, inv, real, legs"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(8, **change)
