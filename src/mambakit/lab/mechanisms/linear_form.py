"""What the scans of all three generations have in common: a state that is linear in the values written to it.

    h_t = a_t h_{t-1} + g_t v_t k_t^T + f_t a_t v_{t-1} k_{t-1}^T        y_t = h_t q_t

with v = x, k = B, q = C, g = delta and f = 0 in Mamba-1 and Mamba-2; turned k and q, g = l delta and f = (1 - l) delta
in Mamba-3 (arXiv 2603.15569), where v, k and q may have several ranks. Unrolled, outputs are values times one matrix,
the "hidden attention" of arXiv 2403.01590:

    y_i = sum_j M_ij v_j        M_ij = (q_i . k_j) exp(S_i - S_j) (g_j + f_{j+1} [i > j])        S = cumsum(log a)

since v_j k_j^T enters at step j with the weight g_j, and again at step j + 1 with f_{j+1} a_{j+1}. In Mamba-1 every
channel is a head of its own and each of its states decays at a rate of its own, so that the product and the exponential
stand under one sum over the states. D, which passes a value on to its own position, is not part of M.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearForm:
    """One layer's scan of a batch, taken down to values, keys, queries and decays.

    Attributes:
        v: (batch, length, rank, heads, headdim), what is written.
        k, q: (batch, length, rank, heads or 1, state).
        decay, log_decay: a and log a, (batch, length, heads, 1 or state).
        present: g, (batch, length, heads).
        following: f, (batch, length, heads); None for 0.
        before: the state before the first step, (batch, heads, headdim, state); None for 0.
        written_before: v k^T of the step before the first, as `before`; None for 0.
    """

    v: Tensor
    k: Tensor
    q: Tensor
    decay: Tensor
    log_decay: Tensor
    present: Tensor
    following: Tensor | None = None
    before: Tensor | None = None
    written_before: Tensor | None = None

    def states(self) -> Tensor:
        """h after every step, (batch, length, heads, headdim, state), one step after another."""
        outer = (self.v[..., :, None] * self.k[..., None, :]).sum(2)  # (batch, length, heads, headdim, state)
        entering = self.present[..., None, None] * outer
        decay = self.decay[..., None, :]  # (batch, length, heads, 1, 1 or state)
        if self.following is not None:
            earlier = torch.zeros_like(outer[:, 0]) if self.written_before is None else self.written_before
            earlier = torch.cat([earlier[:, None], outer[:, :-1]], dim=1)
            entering = entering + self.following[..., None, None] * decay * earlier
        h = torch.zeros_like(outer[:, 0]) if self.before is None else self.before
        kept = []
        for a, b in zip(decay.unbind(1), entering.unbind(1), strict=True):
            h = a * h + b
            kept.append(h)
        return torch.stack(kept, dim=1)

    def read(self, states: Tensor) -> Tensor:
        """y (batch, length, rank, heads, headdim) of the states after every step."""
        return (states[:, :, None] * self.q[..., None, :]).sum(-1)

    def mixing(self) -> Tensor:
        """M (batch, heads, rank, rank, length, length): of the output at i, of rank r, from the value at j, of rank s.

        Above the diagonal it is zero. Sums of logarithms are taken in float64.
        """
        length = self.v.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool, device=self.v.device).triu(1)
        total = self.log_decay.double().cumsum(1).permute(0, 2, 3, 1)  # (batch, heads, 1 or state, length)
        k, q = self.k.permute(0, 3, 2, 4, 1), self.q.permute(0, 3, 2, 4, 1)  # (batch, heads or 1, rank, state, length)
        rates = total.shape[2]
        matrix: Tensor | None = None
        for n in range(rates):
            kept = slice(None) if rates == 1 else slice(n, n + 1)
            scores = torch.einsum("bhrni,bhsnj->bhrsij", q[:, :, :, kept], k[:, :, :, kept])
            # Masked before the exponential: above the diagonal it may overflow, and inf * 0 has no gradient.
            gap = (total[:, :, n, :, None] - total[:, :, n, None, :]).masked_fill(ahead, -torch.inf)
            term = scores * torch.exp(gap).to(scores.dtype)[:, :, None, None]
            matrix = term if matrix is None else matrix + term
        assert matrix is not None
        present = self.present.transpose(1, 2)[:, :, None, :]  # (batch, heads, 1, length) over j
        weight = present.expand(-1, -1, length, -1)
        if self.following is not None:
            later = torch.nn.functional.pad(self.following.transpose(1, 2)[..., 1:], (0, 1))[:, :, None, :]
            own = torch.eye(length, dtype=torch.bool, device=later.device)
            weight = weight + later.masked_fill(own, 0.0)
        return matrix * weight[:, :, None, None].to(matrix.dtype)

    def apply(self, matrix: Tensor) -> Tensor:
        """y (batch, length, rank, heads, headdim) of a matrix as `mixing` returns it."""
        return torch.einsum("bhrsij,bjshp->birhp", matrix, self.v)
