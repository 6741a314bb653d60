"""HiPPO: a state that remembers a signal as its coefficients on Legendre polynomials (arXiv 2008.07669).

LegS keeps the whole past, stretched to one interval, h' = A h / t + B u / t; LegT the last `theta` seconds,
h' = A h + B u. With the orthonormal polynomials of [0, 1], p_n(x) = sqrt(2n + 1) P_n(2x - 1),

    h_n = integral of u(T x) p_n(x)        u(T x) ~ sum_n h_n p_n(x)

S4 takes the matrix of LegS as one of constant coefficients. It is normal but for a term of rank one, A = N - P P^T with
P_n = sqrt(n + 1/2), and N = -1/2 + S with S skew: a Hermitian problem, -i S, gives its modes (arXiv 2111.00396).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.background.discretise import discretise
from mambakit.nn import hippo_legs, legs_modes


def legt(d_state: int, theta: float = 1.0) -> tuple[Tensor, Tensor]:
    """HiPPO-LegT, A (d_state, d_state) and B (d_state,) in float64: memory of the last `theta` seconds."""
    n = torch.arange(d_state, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    sign = torch.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n))
    return -root[:, None] * root * sign / theta, root / theta


class LegsModes(NamedTuple):
    """The matrix of LegS in the basis where it is diagonal but for a rank of one: A = V (diag(modes) - P P^*) V^*."""

    modes: Tensor  # (d_state,) complex, in conjugate pairs
    vectors: Tensor  # V (d_state, d_state), unitary
    P: Tensor  # V^* P (d_state,)
    B: Tensor  # V^* B (d_state,)


def diagonalised_legs(d_state: int) -> LegsModes:
    """The modes of LegS, its term of rank one and its B among them, in complex128."""
    modes, V = legs_modes(d_state)
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64) + 0.5)
    return LegsModes(modes, V, V.mH @ P.to(V), V.mH @ hippo_legs(d_state)[1].to(V))


def legs_memory(signal: Tensor, d_state: int) -> Tensor:
    """The coefficients after every sample, (length, d_state), of a signal (length,) by the bilinear rule.

        h_k = (1 - A / 2k)^-1 ((1 + A / 2k) h_{k-1} + B u_k / k)

    The step and the time that it is divided by are both of one sample, so that no sampling rate appears.
    """
    if signal.dim() != 1 or len(signal) == 0:
        raise DataError(f"signal must be (length,) and not empty, got {tuple(signal.shape)}")
    A, B = hippo_legs(d_state)
    h = torch.zeros(d_state, dtype=torch.float64)
    kept = []
    for k, u in enumerate(signal.double(), start=1):
        Ab, Bb = discretise(A, B, 1 / k, "bilinear")
        h = Ab @ h + Bb * u
        kept.append(h)
    return torch.stack(kept)


def legt_memory(signal: Tensor, d_state: int, window: int) -> Tensor:
    """The coefficients after every sample, (length, d_state), of the last `window` samples, the input held."""
    Ab, Bb = discretise(*legt(d_state, float(window)), 1.0, "zoh")
    h, kept = torch.zeros(d_state, dtype=torch.float64), []
    for u in signal.double():
        h = Ab @ h + Bb * u
        kept.append(h)
    return torch.stack(kept)


def reconstruct(coefficients: Tensor, x: Tensor) -> Tensor:
    """The remembered signal (..., points) at x (points,) in [0, 1], from the oldest it remembers to now.

    Args:
        coefficients: (..., d_state), of `legs_memory` or `legt_memory`.
        x: where in what is remembered.
    """
    return coefficients @ polynomials(coefficients.shape[-1], x).mT


def polynomials(d_state: int, x: Tensor) -> Tensor:
    """p_n(x) = sqrt(2n + 1) P_n(2x - 1), (points, d_state), orthonormal on [0, 1]."""
    values = np.polynomial.legendre.legvander(2 * x.double().numpy() - 1, d_state - 1)
    return torch.from_numpy(values) * torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64) + 1)


def projection(function_values: Tensor, weights: Tensor, x: Tensor, d_state: int) -> Tensor:
    """The coefficients (d_state,) of values at quadrature points x in [0, 1]: what a memory ought to hold."""
    return (weights * function_values) @ polynomials(d_state, x)


def quadrature(points: int) -> tuple[Tensor, Tensor]:
    """Points of [0, 1] and their weights, exact for polynomials of degree 2 points - 1 (Gauss and Legendre)."""
    x, w = np.polynomial.legendre.leggauss(points)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def white_signal(length: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    """A signal (length,) of unit variance with nothing above `bandwidth`, a share of the highest frequency."""
    if not 0 < bandwidth <= 1:
        raise DataError(f"bandwidth must be in (0, 1], got {bandwidth}")
    spectrum = torch.fft.rfft(torch.randn(length, generator=generator, dtype=torch.float64))
    spectrum[max(2, math.ceil(bandwidth * len(spectrum))) :] = 0
    signal = torch.fft.irfft(spectrum, n=length)
    return signal / signal.std()
