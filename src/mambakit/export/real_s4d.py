"""S4D in real numbers and one step after another, for runtimes that have no complex ones.

    h_t = Ab h_{t-1} + Bb u_t        y_t = 2 Re(C h_t) + D u_t

with the numbers of a mode, of itself and not of its conjugate, written (real, imaginary).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.export.plain_operators import over_time
from mambakit.nn import S4D, S4DState


class RealS4D(nn.Module):
    """What `s4d` computes, with its discretised parameters as constants: `y, state = layer(x, state)`."""

    def __init__(self, s4d: S4D) -> None:
        super().__init__()
        log_Ab, Bb = s4d.discretised()
        self.Ab = nn.Parameter(torch.view_as_real(torch.exp(log_Ab)))  # (d_model, modes, 2)
        self.Bb = nn.Parameter(torch.view_as_real(Bb))  # (d_model, modes, 2)
        self.C, self.D, self.out_proj = s4d.C, s4d.D, s4d.out_proj

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4DState]:
        """As S4D's; raises ValueError for packed sequences."""
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None: an exported layer has no packed sequences")
        h = self.Ab.new_zeros(x.shape[0], *self.Ab.shape) if state is None else state.ssm
        y, h = over_time(_step, h, (x,), (self.Ab, self.Bb, self.C, self.D))
        return F.glu(self.out_proj(F.gelu(y))), S4DState(h)


def _step(h: Tensor, u: Tensor, Ab: Tensor, Bb: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    h = _product(Ab, h) + Bb * u.unsqueeze(-1).unsqueeze(-1)  # (batch, d_model, modes, 2)
    return h, 2 * _product(C, h)[..., 0].sum(-1) + D * u


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers (..., 2)."""
    (a_real, a_imag), (b_real, b_imag) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_real * b_real - a_imag * b_imag, a_real * b_imag + a_imag * b_real], dim=-1)
