"""Linear systems in continuous time, h' = A h + B u and y = C h + D u, and the one to start from: a mass on a spring.

    m x'' + c x' + k x = u        h = (x, x')        A = [[0, 1], [-k/m, -c/m]]        B = (0, 1/m)        C = (1, 0)

Its motion is known in closed form, so that every way to compute it can be held against the truth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mambakit.errors import DataError


@dataclass(frozen=True)
class LinearSystem:
    """h' = A h + B u, y = C h + D u with one input and one output, in float64.

    Attributes:
        A: (state, state).
        B, C: (state,).
        D: how much of the input goes past the state.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: float = 0.0

    def free(self, times: Tensor, start: Tensor) -> Tensor:
        """h(t) = exp(A t) h(0) without an input, (times, state)."""
        return matrix_exponential(self.A * times[:, None, None]) @ start

    def impulse_response(self, times: Tensor) -> Tensor:
        """C exp(A t) B (times,): what an input of unit area at time 0 leaves of itself at t."""
        return self.free(times, self.B) @ self.C


@dataclass(frozen=True)
class MassOnSpring:
    """A mass on a spring with a damper.

    Attributes:
        mass: in kg.
        stiffness: of the spring, in N/m.
        damping: in N s/m; below 2 sqrt(mass stiffness) it swings.
    """

    mass: float = 1.0
    stiffness: float = 1.0
    damping: float = 0.2

    def __post_init__(self) -> None:
        if self.mass <= 0 or self.stiffness <= 0 or self.damping < 0:
            raise DataError("mass and stiffness must be positive, and damping not negative")

    def system(self) -> LinearSystem:
        """The same as a linear system of two states, position (m) and speed (m/s), whose input is a force (N)."""
        rates = [[0.0, 1.0], [-self.stiffness / self.mass, -self.damping / self.mass]]
        A = torch.tensor(rates, dtype=torch.float64)
        return LinearSystem(
            A,
            torch.tensor([0.0, 1 / self.mass], dtype=torch.float64),
            torch.tensor([1.0, 0.0], dtype=torch.float64),
        )

    def motion(self, times: Tensor, position: float = 1.0, speed: float = 0.0) -> Tensor:
        """Position and speed (times, 2) after it was let go at `position` with `speed`, without a force.

        x = exp(-g t) (x0 c(t) + (v0 + g x0) s(t)) with g = damping / 2 mass and w^2 = stiffness / mass - g^2, where c
        and s are cos(w t) and sin(w t) / w, cosh and sinh where w^2 < 0, 1 and t where it is zero.
        """
        g = self.damping / (2 * self.mass)
        square = self.stiffness / self.mass - g * g
        t = times.double()
        w = math.sqrt(abs(square))
        if square > 0:
            c, s = torch.cos(w * t), torch.sin(w * t) / w
        elif square < 0:
            c, s = torch.cosh(w * t), torch.sinh(w * t) / w
        else:
            c, s = torch.ones_like(t), t
        x = torch.exp(-g * t) * (position * c + (speed + g * position) * s)
        # The derivatives of c and s are -w^2 s and c.
        slope = torch.exp(-g * t) * (-square * position * s + (speed + g * position) * c)
        return torch.stack([x, slope - g * x], dim=-1)

    def step_response(self, times: Tensor, force: float = 1.0) -> Tensor:
        """Position and speed (times, 2) from rest under a force that stays on: the motion around its new rest."""
        rest = force / self.stiffness
        return self.motion(times, position=-rest) + torch.tensor([rest, 0.0], dtype=torch.float64)


def matrix_exponential(A: Tensor) -> Tensor:
    """exp(A) of (..., state, state) in float64 or complex128; not differentiable."""
    # torch's own has a wrong coefficient for single matrices of a norm of about 0.04 (pytorch issue 196592), and is
    # then right to 1e-10 only.
    from scipy.linalg import expm

    return torch.from_numpy(expm(A.cpu().numpy())).to(A.device)


Input = Callable[[float], float]
