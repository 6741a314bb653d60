"""A system that does not change with time as a convolution: y = K * u with K_l = C Ab^l Bb.

Diagonal systems (S4D, arXiv 2206.11893) have conjugate pairs of modes, of which one is kept: K_l = 2 Re sum C Bb Ab^l.
"""

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.background.discretise import discretise


def dense_kernel(Ab: Tensor, Bb: Tensor, C: Tensor, length: int) -> Tensor:
    """K (length,) of a discrete system: Ab (state, state), Bb and C (state,); one product a step."""
    h, kept = Bb, []
    for _ in range(length):
        kept.append(C @ h)
        h = Ab @ h
    return torch.stack(kept) if kept else C.new_empty(0)


def modes_kernel(A: Tensor, B: Tensor, C: Tensor, dt: float, length: int, method: str = "zoh") -> Tensor:
    """K (length,) of a diagonal system by one product with the matrix of powers (Vandermonde's).

    Args:
        A, B, C: (modes,) complex, one of each conjugate pair; `nn.initial_modes` makes A and B.
        dt: the length of a step.
        length: how much of the kernel.
        method: how to discretise, one of `discretise.METHODS`.
    """
    Ab, Bb = discretise(A, B, dt, method)
    powers = Ab[:, None] ** torch.arange(length, device=A.device)  # (modes, length)
    return 2 * ((C * Bb) @ powers).real


def convolve(u: Tensor, K: Tensor) -> Tensor:
    """y_l = sum over j <= l of K_{l-j} u_j for u (..., length), K (..., length), by FFT.

    Over twice the length, so that what wraps around falls behind the end.
    """
    length = u.shape[-1]
    if K.shape[-1] != length:
        raise DataError(f"K must be as long as u, {length}, got {K.shape[-1]}")
    spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(K, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def recur(Ab: Tensor, Bb: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """y (length,) of u (length,), one step after another: h <- Ab h + Bb u, y = C h.

    Args:
        Ab: (state, state), or (modes,) for a diagonal system of which y is 2 Re(C h).
        Bb, C: (state,) or (modes,).
        u: (length,).
    """
    h, kept = torch.zeros_like(Bb), []
    for u_t in u:
        h = (Ab @ h if Ab.dim() == 2 else Ab * h) + Bb * u_t
        kept.append(C @ h if Ab.dim() == 2 else 2 * (C * h).sum().real)
    return torch.stack(kept) if kept else u.new_empty(0)
