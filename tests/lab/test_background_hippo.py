"""HiPPO against its definition: the best fit by Legendre polynomials, found by quadrature."""

import pytest
import torch

from mambakit.errors import DataError
from mambakit.lab.background import (
    diagonalised_legs,
    legs_memory,
    legt,
    legt_memory,
    modes_kernel,
    polynomials,
    projection,
    quadrature,
    reconstruct,
    white_signal,
)
from mambakit.nn import S4D, hippo_legs, initial_modes


def smooth(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(7 * x) + 0.5 * torch.cos(3 * x)


def test_polynomials_are_orthonormal() -> None:
    x, w = quadrature(20)
    p = polynomials(12, x)
    torch.testing.assert_close((p * w[:, None]).mT @ p, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)


def test_legs_is_normal_but_for_a_term_of_rank_one_and_its_modes_rebuild_it() -> None:
    A, B = hippo_legs(64)
    found = diagonalised_legs(64)
    V = found.vectors
    torch.testing.assert_close(V.mH @ V, torch.eye(64, dtype=V.dtype), rtol=0, atol=1e-12)
    rebuilt = V @ (torch.diag(found.modes) - found.P[:, None] * found.P.conj()) @ V.mH
    torch.testing.assert_close(rebuilt, A.to(V), rtol=0, atol=1e-9)
    torch.testing.assert_close((V @ found.B).real, B, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.modes.imag, -found.modes.imag.flip(0), rtol=0, atol=1e-9)
    assert (found.modes.real == -0.5).all()


def test_legs_remembers_the_projection_of_the_whole_past() -> None:
    x, w = quadrature(40)
    best = projection(smooth(x), w, x, 12)
    errors = []
    for length in (500, 1000, 2000):
        middle = (torch.arange(length, dtype=torch.float64) + 0.5) / length
        errors.append((legs_memory(smooth(middle), 12)[-1] - best).norm())
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_more_states_rebuild_the_signal_better() -> None:
    signal = white_signal(1500, 0.02, torch.Generator().manual_seed(1))
    x = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    errors = [(reconstruct(legs_memory(signal, n)[-1], x) - signal).square().mean().sqrt() for n in (8, 24, 64)]
    assert errors[0] > 0.5  # of a signal of unit variance with fifteen periods
    assert errors[2] < 0.1
    assert errors[2] < errors[1] < errors[0]


def test_legs_forgets_the_time_scale() -> None:
    """The same signal at half the speed leaves the same coefficients."""
    slow = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    torch.testing.assert_close(
        legs_memory(smooth(slow), 8)[-1], legs_memory(smooth(slow[::2]), 8)[-1], rtol=0, atol=4e-3
    )


def test_legt_remembers_the_last_window_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    signal = white_signal(1200, 0.01, generator)
    x = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    rebuilt = reconstruct(legt_memory(signal, 24, 300)[-1], x)
    assert (rebuilt - signal[-300:]).square().mean().sqrt() < 0.1
    other = signal.clone()
    other[:600] = 0.0  # two windows ago
    torch.testing.assert_close(legt_memory(other, 24, 300)[-1], legt_memory(signal, 24, 300)[-1], rtol=0, atol=0.05)


def test_legt_rests_where_a_constant_is_one_times_the_first_polynomial() -> None:
    A, B = legt(6, theta=2.0)
    rest = torch.linalg.solve(-A, B)
    torch.testing.assert_close(rest, torch.eye(6, dtype=torch.float64)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_kernels_of_the_initial_modes_are_those_of_the_layer(init: str, method: str) -> None:
    layer = S4D(3, 8, method, init, dtype=torch.float64)
    A, B = initial_modes(init, 8)
    C = torch.view_as_complex(layer.C.detach())
    for channel in range(3):
        ours = modes_kernel(A, B, C[channel], layer.log_dt[channel].exp().item(), 50, method)
        torch.testing.assert_close(ours, layer.kernel(50)[channel], rtol=0, atol=1e-10)


def test_what_cannot_be_remembered_is_refused() -> None:
    with pytest.raises(DataError, match="signal must be"):
        legs_memory(torch.zeros(2, 3), 4)
    with pytest.raises(DataError, match="bandwidth must be in"):
        white_signal(10, 0.0, torch.Generator())
