"""S4D: a linear, time-invariant state space with a diagonal state matrix (arXiv 2206.11893), Mamba's ancestor.

Every channel has d_state / 2 complex modes, each standing for itself and its conjugate:

    h' = A h + B u        y = 2 Re(C h) + D u

in continuous time, discretised with the channel's step dt by

    zoh       Ab = exp(dt A)                      Bb = (Ab - 1) / A * B
    bilinear  Ab = (1 + dt A / 2) / (1 - dt A / 2)    Bb = dt / (1 - dt A / 2) * B

What does not change with time needs no scan: a whole sequence is convolved with K_l = 2 Re(C Ab^l Bb) by FFT, and
both states enter in closed form:

    y_l = (K * u)_l + 2 Re(C Ab^(l+1) h_0)        h_L = Ab^L h_0 + sum_j Ab^(L-1-j) Bb u_j

The powers Ab^l, l = i s + r < L with s about sqrt(L), are always used as the products Ab^(i s) Ab^r, so that no tensor
of (d_model, d_state, L) is formed.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.nn.linear import Linear
from mambakit.nn.precision import KeepsFloat32
from mambakit.ops.packing import check_packing, sequence_bounds

INITS = ("lin", "inv", "real", "legs")
DISCRETISATIONS = ("zoh", "bilinear")


class S4DState(NamedTuple):
    """What an S4D mixer carries from one step to the next."""

    ssm: Tensor  # (batch, d_model, d_state / 2, 2), real and imaginary parts; float32 (float64 in a float64 model)


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, A (d_state, d_state) and B (d_state,) in float64: memory by Legendre polynomials (arXiv 2008.07669).

    The states of h' = A h / t + B u / t are the coefficients of the whole past on the Legendre polynomials.
    """
    root = torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64) + 1)
    return -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(1.0, d_state + 1, dtype=torch.float64)), root


class S4D(KeepsFloat32):
    """S4D with its activation and output mixing, glu(out_proj(gelu(y))): `y, state = s4d(x, state)`.

    Args:
        d_model: width of the input and output.
        d_state: states of each channel, an even number.
        discretisation: "zoh" or "bilinear".
        init: of A. "lin" -1/2 + i pi n; "inv" -1/2 + i (N / pi) (N / (2n + 1) - 1); "real" -(n + 1); "legs" the
            eigenvalues of the normal part of HiPPO-LegS, with its B. The others have B = 1.
        dt_min, dt_max: initial steps are drawn log-uniformly between these.
        bias: whether the out-projection has a bias.
        device, dtype: of the parameters; those beside projections and norms are float32 at least.
    """

    in_float32 = ("log_A_real", "A_imag", "B", "C", "D", "log_dt")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        discretisation: str = "zoh",
        init: str = "lin",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2 != 0:
            raise ValueError(f"d_state must be even, for its states are conjugate pairs: got {d_state}")
        if discretisation not in DISCRETISATIONS:
            raise ValueError(f"discretisation must be one of {', '.join(DISCRETISATIONS)}, got {discretisation!r}")
        self.d_model, self.d_state, self.discretisation = d_model, d_state, discretisation
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        A, B = initial_modes(init, d_state)
        made: dict[str, Any] = {"dtype": wide, "device": device}
        self.log_A_real = nn.Parameter(torch.log(-A.real).to(device, wide).repeat(d_model, 1))
        self.A_imag = nn.Parameter(A.imag.to(device, wide).repeat(d_model, 1))
        self.B = nn.Parameter(torch.view_as_real(B).to(device, wide).repeat(d_model, 1, 1))
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2, **made) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.ones(d_model, **made))
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(torch.rand(d_model, **made) * (high - low) + low)
        self.out_proj = Linear(d_model, 2 * d_model, bias=bias, device=device, dtype=dtype)
        for parameter in (self.log_A_real, self.A_imag, self.B, self.D, self.log_dt):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4DState]:
        """Mix (batch, length, d_model) along its length.

        Args:
            x: (batch, length, d_model).
            state: what an earlier call returned, to carry on from there; None starts afresh.
            cu_seqlens: (sequences + 1,) for packed sequences; batch is then 1 and states are per sequence.

        Returns:
            y (batch, length, d_model) and the state after the last step.
        """
        check_packing(x.shape[0], cu_seqlens)
        u = x.to(self.log_dt.dtype).transpose(1, 2)  # (batch, d_model, length)
        before = None if state is None else torch.view_as_complex(state.ssm)  # (sequences, d_model, d_state / 2)
        with torch.autocast(x.device.type, enabled=False):  # there are no complex numbers of half precision
            log_Ab, Bb = self.discretised()
            if cu_seqlens is None:
                y, after = self._mix(u, before, log_Ab, Bb)
            else:
                bounds = sequence_bounds(x.shape[0], x.shape[1], cu_seqlens)
                found = [
                    self._mix(u[:, :, first:last], None if before is None else before[s : s + 1], log_Ab, Bb)
                    for s, (first, last) in enumerate(itertools.pairwise(bounds))
                ]
                y = torch.cat([u[:, :, :0], *(y for y, _ in found)], dim=2)
                after = torch.cat([Bb.new_empty(0, *Bb.shape), *(after for _, after in found)])
        y = F.gelu(y + self.D[:, None] * u).transpose(1, 2)  # (batch, length, d_model)
        return F.glu(self.out_proj(y.to(self.out_proj.weight.dtype))), S4DState(torch.view_as_real(after))

    def step(self, x: Tensor, state: S4DState | None = None) -> tuple[Tensor, S4DState]:
        """One step: x and y are (batch, d_model)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def discretised(self) -> tuple[Tensor, Tensor]:
        """The logarithm of Ab, and Bb: (d_model, d_state / 2) complex each."""
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        B, dt = torch.view_as_complex(self.B), torch.exp(self.log_dt)[:, None]
        if self.discretisation == "zoh":
            return dt * A, torch.expm1(dt * A) / A * B
        half = dt * A / 2
        return torch.log((1 + half) / (1 - half)), dt / (1 - half) * B

    def kernel(self, length: int) -> Tensor:
        """K (d_model, length), the response to an impulse (D left out)."""
        log_Ab, Bb = self.discretised()
        return _responses(torch.view_as_complex(self.C) * Bb, *_powers(log_Ab, length))[:, :length]

    def _mix(self, u: Tensor, before: Tensor | None, log_Ab: Tensor, Bb: Tensor) -> tuple[Tensor, Tensor]:
        """2 Re(C h) (batch, d_model, length) and the state after the last step (batch, d_model, d_state / 2)."""
        length = u.shape[2]
        C = torch.view_as_complex(self.C)
        if length == 0:
            return u, Bb.new_zeros(u.shape[0], *Bb.shape) if before is None else before
        if length == 1:
            after = Bb * u if before is None else torch.exp(log_Ab) * before + Bb * u
            return 2 * (C * after).sum(-1, keepdim=True).real, after
        starts, within = _powers(log_Ab, length)
        K = _responses(C * Bb, starts, within)[:, :length]
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(K, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
        after = Bb * _weighted_sum(u.flip(2), starts, within)
        if before is not None:
            y = y + _responses(C * torch.exp(log_Ab) * before, starts, within)[..., :length]
            after = after + torch.exp(length * log_Ab) * before
        return y, after


def _powers(log_Ab: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Ab^(i s) (d_model, blocks, modes) and Ab^r (d_model, modes, s), where blocks * s >= length."""
    size = math.isqrt(length - 1) + 1
    steps = torch.arange(size, dtype=log_Ab.real.dtype, device=log_Ab.device)
    blocks = steps[: -(-length // size)] * size
    return torch.exp(log_Ab[:, None] * blocks[:, None]), torch.exp(log_Ab[:, :, None] * steps)


def _responses(weights: Tensor, starts: Tensor, within: Tensor) -> Tensor:
    """2 Re sum_n w_n Ab_n^l for weights (..., d_model, modes): (..., d_model, blocks * s)."""
    left = weights[..., None, :] * starts  # (..., d_model, blocks, modes)
    return 2 * (left.real @ within.real - left.imag @ within.imag).flatten(-2)


def _weighted_sum(v: Tensor, starts: Tensor, within: Tensor) -> Tensor:
    """sum_l Ab^l v_l for v (batch, d_model, length): (batch, d_model, modes)."""
    blocks, size = starts.shape[1], within.shape[2]
    v = F.pad(v, (0, blocks * size - v.shape[2])).unflatten(2, (blocks, size))
    inner = torch.complex(v @ within.real.transpose(1, 2), v @ within.imag.transpose(1, 2))
    return (starts * inner).sum(2)  # over the blocks, (batch, d_model, blocks, modes)


def initial_modes(init: str, d_state: int) -> tuple[Tensor, Tensor]:
    """A and B (d_state / 2,) of one channel, complex128, by the name that `S4D` takes as its `init`.

    Raises ValueError for another name.
    """
    n = torch.arange(d_state // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    if init == "lin":
        A = torch.complex(half, math.pi * n)
    elif init == "inv":
        A = torch.complex(half, d_state / math.pi * (d_state / (2 * n + 1) - 1))
    elif init == "real":
        A = torch.complex(-(n + 1), torch.zeros_like(n))
    elif init == "legs":
        modes, vectors = legs_modes(d_state)
        kept = slice(d_state // 2, None)  # of each conjugate pair the one that turns forward
        return modes[kept], vectors.mH[kept] @ hippo_legs(d_state)[1].to(vectors)
    else:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    return A, torch.ones_like(A)


def legs_modes(d_state: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues (d_state,), ascending, and eigenvectors of the normal part of HiPPO-LegS, in complex128.

    That part is A + P P^T with P_n = sqrt(n + 1/2): -1/2 plus a skew-symmetric matrix S, and -i S is Hermitian. The
    eigenvalues of A itself are so ill-conditioned that double precision loses them.
    """
    A, _ = hippo_legs(d_state)
    P = torch.sqrt(torch.arange(d_state, dtype=torch.float64) + 0.5)
    S = A + P[:, None] * P + 0.5 * torch.eye(d_state, dtype=torch.float64)
    frequencies, vectors = torch.linalg.eigh(-1j * S)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), vectors
