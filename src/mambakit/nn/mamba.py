"""The Mamba-1 mixer (arXiv 2312.00752, figure 3 and algorithm 2).

    x, z      = in_proj(hidden)
    x         = silu(conv1d(x))
    dt, B, C  = x_proj(x)
    y         = selective_scan(x, dt_proj(dt), -exp(A_log), B, C, D, z)
    output    = out_proj(y)

Parameters have the names and shapes of the public checkpoints, and their initial values.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import ops
from mambakit.nn.convolution import silu_convolution
from mambakit.nn.initial_steps import initial_dt_bias
from mambakit.nn.joints import as_built, has_hooks
from mambakit.nn.linear import Linear
from mambakit.nn.precision import KeepsFloat32
from mambakit.nn.step_products import added_product, convolved_product, goes_by_step
from mambakit.ops import decode


class MambaState(NamedTuple):
    """What a Mamba mixer carries from one step to the next."""

    conv: Tensor  # (batch, d_conv - 1, d_inner), the last inputs of the convolution, in its dtype
    ssm: Tensor  # (batch, d_inner, d_state), float32 (float64 in a float64 model)


class DeltaProjection(KeepsFloat32, Linear):
    """A linear layer whose bias the scan adds, in float32, so that a step of 1e-3 survives bfloat16 activations."""

    in_float32 = ("bias",)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight)


class Mamba(KeepsFloat32):
    """Mamba-1: `y, state = mamba(x, state)`.

    Args:
        d_model: width of the input and output.
        d_state: states of each channel.
        d_conv: taps of the causal convolution.
        expand: d_inner = expand * d_model channels inside.
        dt_rank: width of the projection that makes the step; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: initial steps are drawn log-uniformly between the first two, not below the third.
        dt_scale: factor on the spread of dt_proj's initial weights.
        conv_bias, bias: whether the convolution and the in- and out-projections have biases.
        b_c_dt_rms_eps: what FalconMamba adds to the mean square where it divides dt, B and C, each by the root of its
            own; None leaves them as they are.
        device, dtype: of the parameters; those of rates and steps are float32 at least.
    """

    in_float32 = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
        b_c_dt_rms_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"dt_rank must be a number or 'auto', got {dt_rank!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.b_c_dt_rms_eps = b_c_dt_rms_eps
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = DeltaProjection(self.dt_rank, self.d_inner, **made)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **made)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rates = torch.arange(1, d_state + 1, dtype=wide, device=device).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(rates))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=wide, device=device))
        spread = self.dt_rank**-0.5 * dt_scale
        nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        bias_of_dt = initial_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, device=device, dtype=wide)
        self.dt_proj.bias = nn.Parameter(bias_of_dt)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Mix (batch, length, d_model) along its length.

        Args:
            x: (batch, length, d_model).
            state: what an earlier call returned, to carry on from there; None starts afresh.
            cu_seqlens: (sequences + 1,) for packed sequences; batch is then 1 and states are per sequence.

        Returns:
            y (batch, length, d_model) and the state after the last step.
        """
        conv, ssm = (None, None) if state is None else state
        projected = self.in_proj(x)
        if state is not None and self._has_plain_steps() and decode.serves(x, state, cu_seqlens, self.parameters()):
            u, z = self.split(projected[:, 0])
            u, conv = decode.convolution(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, state.conv)
            y, ssm = self._scan_step(u, z, state.ssm)
            return self.out_proj(y[:, None]), MambaState(conv, ssm)
        u, z = self.split(projected)
        u, conv = self.convolve(u, conv, cu_seqlens)
        delta, B, C = self.select(u)
        y, ssm = ops.selective_scan(
            u,
            delta,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """u and z, (batch, length, d_inner) each, of what in_proj makes."""
        u, z = projected.chunk(2, dim=-1)
        return u, z

    def convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv1d(x)) of x (batch, length, d_inner), and the convolution's state; a subclass may change what it is.

        The compiled stack of `nn.Stepper` knows this class alone, so a subclass is stepped through its layers.
        """
        return silu_convolution(self.conv1d, x, state, cu_seqlens)

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan is steered by: delta (batch, length, d_inner) before its bias and softplus, B and C."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.b_c_dt_rms_eps is not None:
            dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=self.b_c_dt_rms_eps).to(t.dtype) for t in (dt, B, C))
        return self.dt_proj(dt), B, C

    def steps_with_residual(self) -> bool:
        """Whether `step_with_residual` does what the modules do."""
        return self._has_plain_steps() and not has_hooks(self)

    def step_with_residual(self, residual: Tensor, norm: nn.RMSNorm, state: MambaState) -> tuple[Tensor, MambaState]:
        """residual + self(norm(residual)) for one step on a GPU, (batch, d_model): four launches for few sequences."""
        convolution = decode.Convolution(self.conv1d.weight.squeeze(1), self.conv1d.bias, state.conv)
        projected, u, conv = convolved_product(self.in_proj, norm, residual, convolution)
        _, z = self.split(projected)
        y, ssm = self._scan_step(u, z, state.ssm)
        return added_product(self.out_proj, y, residual), MambaState(conv, ssm)

    def _scan_step(self, u: Tensor, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What lies between the convolution and out_proj, in two launches: y (batch, d_inner), and the scan's state."""
        few = goes_by_step(self.x_proj, u.shape[0])
        projected = decode.linear(u, self.x_proj.weight) if few else self.x_proj(u)
        return decode.mamba_scan(u, projected, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D, z, state)

    def _has_plain_steps(self) -> bool:
        """Whether its joints are its own and nothing stands around convolution and dt_proj: no norm, adapter, hook."""
        return (
            as_built(self, Mamba)
            and self.b_c_dt_rms_eps is None
            and type(self.conv1d) is nn.Conv1d
            and type(self.dt_proj) is DeltaProjection
            and not has_hooks(self.conv1d, self.dt_proj)
        )

    def step(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """One step: x and y are (batch, d_model)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state
