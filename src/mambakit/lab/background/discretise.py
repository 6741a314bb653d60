"""From h' = A h + B u to h_{t+1} = Ab h_t + Bb u_t: the ways to take a step of dt, and how wrong each is.

| method            | Ab                                 | Bb                         | error after a fixed time      |
|-------------------|------------------------------------|----------------------------|-------------------------------|
| euler             | 1 + dt A                           | dt B                       | dt                            |
| bilinear          | (1 - dt A/2)^-1 (1 + dt A/2)       | (1 - dt A/2)^-1 dt B       | dt^2                          |
| runge_kutta4      | 1 + z + z^2/2 + z^3/6 + z^4/24     | dt (1 + z/2 + z^2/6 +      | dt^4                          |
|                   | with z = dt A                      | z^3/24) B                  |                               |
| zoh               | exp(dt A)                          | A^-1 (exp(dt A) - 1) B     | none while the input is held  |
| exponential_euler | exp(dt A)                          | dt B                       | dt, none without an input     |

Zero-order hold is what S4D and Mamba's paper say; the code of Mamba, and that of all who followed it, multiplies B by
dt alone and so is the exponential Euler rule. Mamba-3's trapezoid is one of second order (arXiv 2603.15569).

`discretise` takes inputs that are held through a step. `simulate` lets them move within it: Euler and zero-order hold
then see the value at its start, the exponential Euler rule that at its end, as Mamba does, the bilinear rule both ends,
and Runge-Kutta its middle as well; held or not, that makes the first three methods of first order.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.background.systems import Input, LinearSystem, matrix_exponential


def discretise(A: Tensor, B: Tensor, dt: float | Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Ab and Bb for an input that is held through each step.

    Args:
        A: (state, state), or (modes,) real or complex for a diagonal matrix.
        B: (state,) or (modes,).
        dt: the length of a step; for a diagonal matrix also (..., 1), to be spread over its modes.
        method: one of `METHODS`.

    Raises DataError for another method, or for shapes that don't fit.
    """
    if method not in METHODS:
        raise DataError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if A.shape[-1:] != B.shape or A.dim() not in (1, 2) or A.shape[0] != A.shape[-1]:
        raise DataError(
            f"A must be (state, state) or (modes,) beside B (state,), got {tuple(A.shape)}, {tuple(B.shape)}"
        )
    if A.dim() == 1:
        return _DIAGONAL[method](A, B, dt)
    return METHODS[method](A, B, torch.as_tensor(dt, dtype=A.dtype))


def simulate(system: LinearSystem, method: str, u: Input, dt: float, steps: int, start: Tensor) -> Tensor:
    """h after every step, (steps + 1, state), `start` first, under an input that is a function of time."""
    A, B = system.A, system.B
    h, kept = start, [start]
    if method == "runge_kutta4":
        for n in range(steps):
            t = n * dt
            first = A @ h + B * u(t)
            second = A @ (h + dt / 2 * first) + B * u(t + dt / 2)
            third = A @ (h + dt / 2 * second) + B * u(t + dt / 2)
            fourth = A @ (h + dt * third) + B * u(t + dt)
            h = h + dt / 6 * (first + 2 * second + 2 * third + fourth)
            kept.append(h)
        return torch.stack(kept)
    Ab, Bb = discretise(A, B, dt, method)
    seen = {"exponential_euler": lambda t: u(t + dt), "bilinear": lambda t: (u(t) + u(t + dt)) / 2}.get(method, u)
    for n in range(steps):
        h = Ab @ h + Bb * seen(n * dt)
        kept.append(h)
    return torch.stack(kept)


def error_order(errors: Tensor) -> Tensor:
    """The orders (n - 1,) that errors (n,) show, each at half the step of the one before: log2 of their ratios."""
    return torch.log2(errors[:-1] / errors[1:])


def _euler(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return _eye(A) + dt * A, dt * B


def _bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    backward = _eye(A) - dt / 2 * A
    return torch.linalg.solve(backward, _eye(A) + dt / 2 * A), torch.linalg.solve(backward, dt * B)


def _runge_kutta4(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    z, one = dt * A, _eye(A)
    # exp(z) and (exp(z) - 1) / z to the fourth power of dt, by Horner's rule
    Ab = one + z @ (one + z / 2 @ (one + z / 3 @ (one + z / 4)))
    return Ab, dt * (one + z / 2 @ (one + z / 3 @ (one + z / 4))) @ B


def _zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    # One exponential of [[A, B], [0, 0]] gives both, for an A without an inverse too.
    n = A.shape[0]
    both = A.new_zeros(n + 1, n + 1)
    both[:n, :n], both[:n, n] = dt * A, dt * B
    both = matrix_exponential(both)
    return both[:n, :n], both[:n, n]


def _exponential_euler(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return matrix_exponential(dt * A), dt * B


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[0], dtype=A.dtype, device=A.device)


METHODS: Mapping[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "euler": _euler,
    "bilinear": _bilinear,
    "runge_kutta4": _runge_kutta4,
    "zoh": _zoh,
    "exponential_euler": _exponential_euler,
}


def _diagonal_zoh(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    gone = A == 0
    grown = torch.expm1(dt * A) / torch.where(gone, 1.0, A)
    return torch.exp(dt * A), torch.where(gone, dt + 0 * grown, grown) * B


_Modes = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]
_DIAGONAL: Mapping[str, _Modes] = {
    "euler": lambda A, B, dt: (1 + dt * A, dt * B),
    "bilinear": lambda A, B, dt: ((1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)),
    "runge_kutta4": lambda A, B, dt: (
        1 + dt * A * (1 + dt * A / 2 * (1 + dt * A / 3 * (1 + dt * A / 4))),
        dt * (1 + dt * A / 2 * (1 + dt * A / 3 * (1 + dt * A / 4))) * B,
    ),
    "zoh": _diagonal_zoh,
    "exponential_euler": lambda A, B, dt: (torch.exp(dt * A), dt * B),
}
