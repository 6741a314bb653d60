"""The Mamba-3 mixer (arXiv 2603.15569).

    z, x, B, C, dt, A, trap, angles = in_proj(hidden)
    B, C   = rms_norm(B), rms_norm(C)
    A      = min(-f(A), -A_floor)
    y      = mamba3_scan(x, dt, A, B, C, trap, angles, D, z)
    output = out_proj(y)

There is no convolution and no parameter A: the decay, like everything else, is made of the hidden vector. Parameters
have the names and shapes of the public checkpoints, and their initial values.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import ops
from mambakit.nn.initial_steps import initial_dt_bias
from mambakit.nn.linear import Linear
from mambakit.nn.mamba2 import GatedRMSNorm
from mambakit.nn.precision import KeepsFloat32
from mambakit.ops import Mamba3State

A_ACTIVATIONS = ("softplus", "rational")


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its weight."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class Mamba3Parts(NamedTuple):
    """What the projection of Mamba-3 makes of the hidden vectors, as its scan takes it."""

    z: Tensor  # (batch, length, heads, headdim)
    u: Tensor  # (batch, length, heads, headdim)
    B: Tensor  # (batch, length, [rank,] groups, state), normed
    C: Tensor  # (batch, length, [rank,] groups, state), normed
    dt: Tensor  # (batch, length, heads), before its bias and softplus
    A: Tensor  # (batch, length, heads), negative
    trap: Tensor  # (batch, length, heads), before its sigmoid
    angles: Tensor  # (batch, length, pairs)


class Mamba3(KeepsFloat32):
    """Mamba-3: `y, state = mamba3(x, state)`.

    Args:
        d_model: width of the input and output.
        d_state: rows of each head's state.
        expand: d_inner = expand * d_model channels inside, in heads of `headdim`.
        headdim: channels of each head.
        n_groups: heads share B and C in this many groups.
        rope_fraction: how much of the state is rotated, 0.5 or 1.
        mimo_rank: inputs and outputs of each head's state. 1 (SISO) rotates the pairs (2i, 2i + 1) and has none of the
            parameters mimo_x, mimo_z, mimo_o; more (MIMO) rotates (i, i + d_state / 2).
        A_activation: f in A = min(-f(a), -A_floor): "softplus", or "rational", 1 + a for a >= 0 and 1 / (1 - a) below.
            mamba-ssm had softplus until June 2026 and has the other since; a checkpoint does not tell which it was
            trained with.
        A_floor: the least rate of decay.
        dt_min, dt_max, dt_init_floor: initial steps are drawn log-uniformly between the first two, not below the third.
        output_norm: normalise y before the gate, head by head.
        norm_eps: added to the mean square in every RMS norm.
        chunk_size: of `ops.mamba3_scan`.
        device, dtype: of the parameters; those beside projections and norms are float32 at least.

    Raises ValueError where the sizes don't divide, or for a choice that does not exist.
    """

    in_float32 = ("D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        n_groups: int = 1,
        *,
        rope_fraction: float = 0.5,
        mimo_rank: int = 1,
        A_activation: str = "softplus",
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        output_norm: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.expand, self.headdim = d_model, d_state, expand, headdim
        self.n_groups, self.rope_fraction, self.mimo_rank = n_groups, rope_fraction, mimo_rank
        self.A_activation, self.A_floor, self.chunk_size = A_activation, A_floor, chunk_size
        self.d_inner = int(expand * d_model)
        self.heads = self.d_inner // headdim
        self.n_angles = int(d_state * rope_fraction) // 2
        self._check()

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        wide_made: dict[str, Any] = {"device": device, "dtype": wide}
        self.dt_bias = nn.Parameter(initial_dt_bias(self.heads, dt_min, dt_max, dt_init_floor, **wide_made))
        self.B_bias = nn.Parameter(torch.ones(self.heads, mimo_rank, d_state, **wide_made))
        self.C_bias = nn.Parameter(torch.ones(self.heads, mimo_rank, d_state, **wide_made))
        self.mimo_x: nn.Parameter | None = None
        self.mimo_z: nn.Parameter | None = None
        self.mimo_o: nn.Parameter | None = None
        if mimo_rank > 1:
            share = torch.ones(self.heads, mimo_rank, headdim, **wide_made)
            self.mimo_x = nn.Parameter(share / mimo_rank)
            self.mimo_z = nn.Parameter(share.clone())
            self.mimo_o = nn.Parameter(share / mimo_rank)
        self.D = nn.Parameter(torch.ones(self.heads, **wide_made))
        self.in_proj = Linear(d_model, sum(self.widths()), bias=False, **made)
        self.B_norm = RMSNorm(d_state, eps=norm_eps, **made)
        self.C_norm = RMSNorm(d_state, eps=norm_eps, **made)
        self.norm = None
        if output_norm:
            self.norm = GatedRMSNorm(self.d_inner, self.heads, eps=norm_eps, norm_before_gate=True, **made)
        self.out_proj = Linear(self.d_inner, d_model, bias=False, **made)
        for parameter in (self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, state: Mamba3State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        """Mix (batch, length, d_model) along its length.

        Args:
            x: (batch, length, d_model).
            state: what an earlier call returned, to carry on from there; None starts afresh.
            cu_seqlens: (sequences + 1,) for packed sequences; batch is then 1 and states are per sequence.

        Returns:
            y (batch, length, d_model) and the state after the last step.
        """
        return self.mix(self.in_proj(x), state, cu_seqlens)

    def mix(
        self, projected: Tensor, state: Mamba3State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Mamba3State]:
        """What follows the in-projection: `projected` is z, x, B, C, dt, A, trap, angles side by side, of `widths`.

        A subclass may change them on their way here. The compiled stack of `nn.Stepper` knows this class alone, so a
        subclass is stepped through its layers.
        """
        z, u, B, C, dt, A, trap, angles = self.split(projected)
        y, state = ops.mamba3_scan(
            u,
            dt,
            A,
            B,
            C,
            trap,
            angles,
            self.D,
            z if self.norm is None else None,
            self.dt_bias,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            mimo_z=self.mimo_z if self.norm is None else None,
            mimo_o=self.mimo_o if self.norm is None else None,
            dt_softplus=True,
            interleaved=self.mimo_rank == 1,
            chunk_size=self.chunk_size,
            initial_state=state,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        if self.norm is not None:
            y = self.gated_norm(self.norm, y, z)
        return self.out_proj(y.flatten(-2)), state

    def split(self, projected: Tensor) -> Mamba3Parts:
        """What in_proj makes, B and C past their norms, A a rate."""
        z, u, B, C, dt, A, trap, angles = projected.split(self.widths(), dim=-1)
        z, u = (t.unflatten(-1, (self.heads, self.headdim)) for t in (z, u))
        shape = (self.mimo_rank, self.n_groups, self.d_state) if self.mimo_rank > 1 else (self.n_groups, self.d_state)
        B, C = self.B_norm(B.unflatten(-1, shape)), self.C_norm(C.unflatten(-1, shape))
        return Mamba3Parts(z, u, B, C, dt, self._rate(A), trap, angles)

    def step(self, x: Tensor, state: Mamba3State | None = None) -> tuple[Tensor, Mamba3State]:
        """One step: x and y are (batch, d_model)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def _rate(self, a: Tensor) -> Tensor:
        """A, at most -A_floor, of what in_proj gave for it; in float32 (float64 for float64)."""
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        if self.A_activation == "softplus":
            return (-F.softplus(a)).clamp(max=-self.A_floor)
        # The branch that is not taken must be finite too, or its gradient is 0 * inf.
        f = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))
        return (-f).clamp(max=-self.A_floor)

    def gated_norm(self, norm: GatedRMSNorm, y: Tensor, z: Tensor) -> Tensor:
        """y (batch, length, [rank,] heads, headdim) normed, gated by z, and under MIMO summed over its ranks."""
        if self.mimo_z is None or self.mimo_o is None:
            return norm(y.flatten(-2), z.flatten(-2)).view_as(z)
        gate = z.unsqueeze(2) * self.mimo_z.transpose(0, 1)  # (batch, length, rank, heads, headdim)
        normed = norm(y.flatten(-2), gate.flatten(-2)).view_as(gate)
        return (normed * self.mimo_o.transpose(0, 1)).sum(2).to(y.dtype)

    def widths(self) -> list[int]:
        """Of what in_proj makes: z, x, B, C, dt, A, trap, angles."""
        vectors = self.d_state * self.n_groups * self.mimo_rank
        heads = self.heads
        return [self.d_inner, self.d_inner, vectors, vectors, heads, heads, heads, self.n_angles]

    def _check(self) -> None:
        if self.A_activation not in A_ACTIVATIONS:
            raise ValueError(f"A_activation must be one of {', '.join(A_ACTIVATIONS)}, got {self.A_activation!r}")
        if self.rope_fraction not in (0.5, 1):
            raise ValueError(f"rope_fraction must be 0.5 or 1, got {self.rope_fraction}")
        if self.d_inner % self.headdim != 0:
            raise ValueError(f"headdim must divide expand * d_model = {self.d_inner}, got {self.headdim}")
        if self.n_groups < 1 or self.heads % self.n_groups != 0:
            raise ValueError(f"n_groups must divide the {self.heads} heads, got {self.n_groups}")
        if self.mimo_rank < 1:
            raise ValueError(f"mimo_rank must be at least 1, got {self.mimo_rank}")
        if self.d_state % 2 != 0 or self.n_angles < 1:
            raise ValueError(f"d_state must be even and leave an angle to rotate by, got {self.d_state}")
