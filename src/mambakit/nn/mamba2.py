"""The Mamba-2 mixer (arXiv 2405.21060, figure 6 and section 7).

    z, xBC, dt = in_proj(hidden)
    x, B, C    = silu(conv1d(xBC))
    y          = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
    output     = out_proj(norm(y silu(z)))

Parameters have the names, shapes and order of the public checkpoints, and their initial values.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambakit import ops
from mambakit.nn.convolution import silu_convolution
from mambakit.nn.initial_steps import initial_dt_bias
from mambakit.nn.joints import as_built, has_hooks
from mambakit.nn.linear import Linear
from mambakit.nn.precision import KeepsFloat32
from mambakit.nn.step_products import added_product, convolved_product, goes_by_step
from mambakit.ops import decode


class Mamba2State(NamedTuple):
    """What a Mamba-2 mixer carries from one step to the next."""

    conv: Tensor  # (batch, d_conv - 1, d_inner + 2 n_groups d_state), the last inputs of the convolution, in its dtype
    ssm: Tensor  # (batch, heads, headdim, d_state), float32 (float64 in a float64 model)


class GatedRMSNorm(nn.Module):
    """`ops.gated_rms_norm` with its weight: `y = norm(x, z)`.

    Args:
        dim: channels.
        groups: groups of channels, each with a mean square of its own.
        eps: added to the mean square.
        norm_before_gate: whether the gate multiplies what was normalised, or is normalised with it.
    """

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return ops.gated_rms_norm(
            x, self.weight, z, eps=self.eps, groups=self.groups, norm_before_gate=self.norm_before_gate
        )


class Mamba2(KeepsFloat32):
    """Mamba-2: `y, state = mamba(x, state)`.

    Args:
        d_model: width of the input and output.
        d_state: states of each channel.
        d_conv: taps of the causal convolution.
        expand: d_inner = expand * d_model channels inside.
        headdim: channels of a head, which decay together; it divides d_inner.
        n_groups: groups of heads; those of a group share B and C, and in the norm a mean square.
        A_init_range: initial decay rates are drawn uniformly from this interval.
        dt_min, dt_max, dt_init_floor: initial steps are drawn log-uniformly between the first two, not below the third.
        dt_limit: steps are clamped to this interval.
        D_has_hdim: whether D is one number a channel and not one a head.
        rmsnorm: whether a norm stands before the out-projection; without it the gate alone does.
        norm_before_gate: whether the gate multiplies what was normalised, or is normalised with it.
        norm_eps: added to the mean square in the norm.
        chunk_size: steps that go into one matrix product, None for a good choice; the result is the same.
        conv_bias, bias: whether the convolution and the in- and out-projections have biases.
        device, dtype: of the parameters; those of rates and steps are float32 at least.
    """

    in_float32 = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        n_groups: int = 1,
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.n_groups, self.dt_limit, self.chunk_size = headdim, n_groups, dt_limit, chunk_size
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim != 0:
            raise ValueError(f"headdim must divide expand * d_model = {self.d_inner}, got {headdim}")
        self.heads = self.d_inner // headdim
        if self.heads % n_groups != 0:
            raise ValueError(f"n_groups must divide the number of heads {self.heads}, got {n_groups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be an interval of positive numbers, got {A_init_range}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_xBC = self.d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.d_xBC + self.heads, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_xBC,
            self.d_xBC,
            d_conv,
            groups=self.d_xBC,
            padding=d_conv - 1,
            bias=conv_bias,
            **made,
        )
        self.norm = None
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_inner,
                n_groups,
                eps=norm_eps,
                norm_before_gate=norm_before_gate,
                **made,
            )
        elif norm_before_gate:
            raise ValueError("norm_before_gate needs a norm: rmsnorm=True")
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **made)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.dt_bias = nn.Parameter(
            initial_dt_bias(self.heads, dt_min, dt_max, dt_init_floor, device=device, dtype=wide)
        )
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=wide, device=device).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.d_inner if D_has_hdim else self.heads, dtype=wide, device=device))
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
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
            z, xBC, dt = self.split(projected[:, 0])
            xBC, conv = decode.convolution(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, state.conv)
            y, ssm = self._scan_step(z, xBC, dt, state.ssm)
            return self.out_proj((y if self.norm is None else self.norm(y, z))[:, None]), Mamba2State(conv, ssm)
        z, xBC, dt = self.split(projected)
        xBC, conv = self.convolve(xBC, conv, cu_seqlens)
        u, B, C = self.select(xBC)
        y, ssm = ops.ssd(
            u,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.skip,
            z.unflatten(-1, (self.heads, self.headdim)) if self.norm is None else None,
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
            initial_state=ssm,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = y.flatten(-2)  # (batch, length, d_inner)
        if self.norm is not None:
            y = self.norm(y, z)
        return self.out_proj(y), Mamba2State(conv, ssm)

    @property
    def skip(self) -> Tensor:
        """D as the scan takes it, (heads,) or (heads, headdim)."""
        return self.D if self.D.shape[0] == self.heads else self.D.unflatten(0, (self.heads, self.headdim))

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (batch, length, d_inner), xBC (batch, length, d_xBC), dt (batch, length, heads) of what in_proj makes."""
        z, xBC, dt = projected.split([self.d_inner, self.d_xBC, self.heads], dim=-1)
        return z, xBC, dt

    def convolve(self, xBC: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """silu(conv1d(xBC)) of x, B and C side by side, (batch, length, d_inner + 2 n_groups d_state), and the
        convolution's state; a subclass may change what it is.

        The compiled stack of `nn.Stepper` knows this class alone, so a subclass is stepped through its layers.
        """
        return silu_convolution(self.conv1d, xBC, state, cu_seqlens)

    def select(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (batch, length, heads, headdim), B and C (batch, length, groups, state) of the convolved xBC."""
        shared = self.n_groups * self.d_state
        u, B, C = xBC.split([self.d_inner, shared, shared], dim=-1)
        B, C = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (B, C))
        return u.unflatten(-1, (self.heads, self.headdim)), B, C

    def steps_with_residual(self) -> bool:
        """Whether `step_with_residual` does what the modules do."""
        return self._has_plain_steps() and not has_hooks(self)

    def step_with_residual(self, residual: Tensor, norm: nn.RMSNorm, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """residual + self(norm(residual)) for one step on a GPU, (batch, d_model): three launches for few sequences."""
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        convolution = decode.Convolution(taps, bias, state.conv, self.d_inner)
        projected, xBC, conv = convolved_product(self.in_proj, norm, residual, convolution)
        z, _, dt = self.split(projected)
        y, ssm = self._scan_step(z, xBC, dt, state.ssm)
        gated, out = self.norm, self.out_proj
        if gated is not None and self._norm_goes_with_out_proj(residual.shape[0]):
            summed = decode.linear(
                y,
                out.weight,
                out.bias,
                norm=gated.weight,
                eps=gated.eps,
                z=z,
                norm_before_gate=gated.norm_before_gate,
                residual=residual,
                dtype=residual.dtype,
            )
        else:
            summed = added_product(out, y if gated is None else gated(y, z), residual)
        return summed, Mamba2State(conv, ssm)

    def _norm_goes_with_out_proj(self, rows: int) -> bool:
        """Whether the gated norm and out_proj are one launch of a step."""
        return (
            type(self.norm) is GatedRMSNorm
            and self.norm.groups == 1
            and not has_hooks(self.norm)
            and goes_by_step(self.out_proj, rows, after_norm=True)
        )

    def _scan_step(self, z: Tensor, xBC: Tensor, dt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """y (batch, d_inner), gated by z where no norm does that, of the convolved xBC; and the scan's state."""
        D = self.skip[:, None].expand(-1, self.headdim) if self.skip.dim() == 1 else self.skip
        gate = z if self.norm is None else None
        return decode.mamba2_scan(xBC, dt, self.A_log, D, gate, self.dt_bias, self.dt_limit, state)

    def _has_plain_steps(self) -> bool:
        """Whether its joints are its own and the convolution is one: no adapter, no hook."""
        return as_built(self, Mamba2) and type(self.conv1d) is nn.Conv1d and not has_hooks(self.conv1d)

    def step(self, x: Tensor, state: Mamba2State | None = None) -> tuple[Tensor, Mamba2State]:
        """One step: x and y are (batch, d_model)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state
