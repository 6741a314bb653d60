"""Continuous systems and their discretisations: closed forms, and the order of each error by halving the step."""

import math

import pytest
import torch

from mambakit.errors import DataError
from mambakit.lab.background import (
    METHODS,
    LinearSystem,
    MassOnSpring,
    discretise,
    error_order,
    matrix_exponential,
    simulate,
)

SPRINGS = {
    "swinging": MassOnSpring(2.0, 3.0, 0.4),
    "critical": MassOnSpring(1.0, 4.0, 4.0),
    "creeping": MassOnSpring(1.0, 1.0, 3.0),
}
START = torch.tensor([1.0, -0.5], dtype=torch.float64)


@pytest.mark.parametrize("name", SPRINGS)
def test_the_closed_form_of_the_spring_is_the_matrix_exponential(name: str) -> None:
    spring, times = SPRINGS[name], torch.linspace(0, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(spring.motion(times, 1.0, -0.5), spring.system().free(times, START), rtol=0, atol=1e-12)


def test_the_spring_obeys_newton() -> None:
    spring = SPRINGS["swinging"]
    times = torch.linspace(0, 3, 7, dtype=torch.float64, requires_grad=True)
    x, v = spring.motion(times).unbind(-1)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), times, retain_graph=True)[0], v, rtol=0, atol=1e-12)
    acceleration = torch.autograd.grad(v.sum(), times)[0]
    torch.testing.assert_close(2.0 * acceleration, -3.0 * x - 0.4 * v, rtol=0, atol=1e-12)


def test_a_force_that_stays_on_moves_the_rest_to_force_over_stiffness() -> None:
    spring = MassOnSpring(1.0, 4.0, 1.0)
    end = spring.step_response(torch.tensor([0.0, 60.0], dtype=torch.float64), force=2.0)
    torch.testing.assert_close(end, torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SPRINGS)
def test_zero_order_hold_is_exact_while_the_input_is_held(name: str) -> None:
    spring = SPRINGS[name]
    h = simulate(spring.system(), "zoh", lambda t: 1.0, 0.5, 20, torch.zeros(2, dtype=torch.float64))
    times = 0.5 * torch.arange(21, dtype=torch.float64)
    torch.testing.assert_close(h, spring.step_response(times), rtol=0, atol=1e-12)


def errors(method: str, u: object, exact: torch.Tensor, end: float, start: torch.Tensor) -> torch.Tensor:
    system = SPRINGS["swinging"].system()
    found = []
    for steps in (64, 128, 256):
        h = simulate(system, method, u, end / steps, steps, start)[-1]  # type: ignore[arg-type]
        found.append((h - exact).norm())
    return torch.stack(found)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("bilinear", 2), ("runge_kutta4", 4)])
def test_the_error_of_a_free_motion_falls_by_the_order_of_the_method(method: str, order: int) -> None:
    exact = SPRINGS["swinging"].motion(torch.tensor([2.0], dtype=torch.float64), 1.0, -0.5)[0]
    found = error_order(errors(method, lambda t: 0.0, exact, 2.0, START))
    assert (found - order).abs().max() < 0.1


@pytest.mark.parametrize("method", ["zoh", "exponential_euler"])
def test_exponentials_make_no_error_without_an_input(method: str) -> None:
    exact = SPRINGS["swinging"].motion(torch.tensor([2.0], dtype=torch.float64), 1.0, -0.5)[0]
    assert errors(method, lambda t: 0.0, exact, 2.0, START).max() < 1e-12


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("zoh", 1), ("exponential_euler", 1), ("bilinear", 2), ("runge_kutta4", 4)],
)
def test_the_error_under_a_moving_force_falls_by_the_order_of_the_method(method: str, order: int) -> None:
    # exp(-t) as a third state of a system without an input, so that the truth is one matrix exponential.
    spring = SPRINGS["swinging"].system()
    A = torch.zeros(3, 3, dtype=torch.float64)
    A[:2, :2], A[:2, 2], A[2, 2] = spring.A, spring.B, -1.0
    both = LinearSystem(A, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    exact = both.free(torch.tensor([2.0], dtype=torch.float64), torch.cat([START, torch.ones(1).double()]))[0, :2]
    found = error_order(errors(method, lambda t: math.exp(-t), exact, 2.0, START))
    assert (found - order).abs().max() < 0.1


def test_the_exponential_euler_rule_is_of_first_order_even_for_a_held_input() -> None:
    exact = SPRINGS["swinging"].step_response(torch.tensor([2.0], dtype=torch.float64))[0]
    rest = torch.zeros(2, dtype=torch.float64)
    assert (error_order(errors("exponential_euler", lambda t: 1.0, exact, 2.0, rest)) - 1).abs().max() < 0.1
    assert errors("zoh", lambda t: 1.0, exact, 2.0, rest).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_diagonal_matrix_is_discretised_mode_by_mode(method: str) -> None:
    A = torch.tensor([-0.5 + 3j, -1.0 + 0j, -2.0 - 1j], dtype=torch.complex128)
    B = torch.tensor([1.0 + 1j, 2.0, -1.0j], dtype=torch.complex128)
    Ab, Bb = discretise(A, B, 0.3, method)
    dense_A, dense_B = discretise(torch.diag(A), B, 0.3, method)
    torch.testing.assert_close(torch.diag(Ab), dense_A, rtol=0, atol=1e-13)
    torch.testing.assert_close(Bb, dense_B, rtol=0, atol=1e-13)


def test_zero_order_hold_needs_no_inverse() -> None:
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # a mass without a spring
    Ab, Bb = discretise(A, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5, "zoh")
    torch.testing.assert_close(Ab, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(Bb, torch.tensor([0.125, 0.5], dtype=torch.float64))
    _, still = discretise(torch.zeros(1).double(), torch.ones(1).double(), 0.5, "zoh")
    assert still == 0.5


def test_rungekutta_on_held_inputs_is_its_simulation() -> None:
    system = SPRINGS["creeping"].system()
    Ab, Bb = discretise(system.A, system.B, 0.2, "runge_kutta4")
    h = simulate(system, "runge_kutta4", lambda t: 3.0, 0.2, 1, START)[-1]
    torch.testing.assert_close(h, Ab @ START + 3.0 * Bb, rtol=0, atol=1e-14)


def test_the_matrix_exponential_is_exact_where_a_rotation_says_so() -> None:
    for angle in (1e-3, 0.04, 0.5, 3.0):  # torch's own is wrong by 1e-10 at the second
        turn = matrix_exponential(torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64))
        assert abs(turn[0, 0].item() - math.cos(angle)) < 1e-13
        assert abs(turn[1, 0].item() - math.sin(angle)) < 1e-13


def test_what_makes_no_system_is_refused() -> None:
    with pytest.raises(DataError, match="method must be one of euler"):
        discretise(torch.eye(2), torch.ones(2), 0.1, "heun")
    with pytest.raises(DataError, match="A must be"):
        discretise(torch.eye(2), torch.ones(3), 0.1, "zoh")
    with pytest.raises(DataError, match="must be positive"):
        MassOnSpring(stiffness=0.0)
