"""`mamba_ssm.modules.mamba_simple.Mamba`: its constructor, parameter names and states on `mambakit.nn.Mamba`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import nn, ops
from mambakit.compat.convolutions import causal_conv1d_fn
from mambakit.compat.inference import InferenceParams, states_of_layer
from mambakit.compat.refusal import NotServed
from mambakit.compat.scans import mamba_inner_fn


class Mamba(nn.Mamba):
    """The Mamba-1 mixer as mamba_ssm has it: `y = mamba(x, inference_params)`, both (batch, length, d_model).

    The arguments are mamba_ssm's. `use_fast_path` is about speed alone: there is one path here. Rates and steps stay
    float32 where the model is cast to half precision.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dt_init not in ("random", "constant"):
            raise NotServed(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_scale=dt_scale,
            conv_bias=conv_bias,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        if dt_init == "constant":
            torch.nn.init.constant_(self.dt_proj.weight, self.dt_rank**-0.5 * dt_scale)
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.use_fast_path, self.layer_idx, self.activation = use_fast_path, layer_idx, "silu"

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """Mix (batch, length, d_model). With `inference_params` the states that it holds are updated in place: from
        zero where its seqlen_offset is 0, else from where they stand, by as many tokens as there are."""
        if inference_params is None:
            return mamba_inner_fn(
                self.in_proj(hidden_states).transpose(1, 2),
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                -torch.exp(self.A_log),
                None,
                None,
                self.D,
                delta_bias=self.dt_proj.bias,
            )
        conv_state, ssm_state = states_of_layer(self, inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return self.step(hidden_states, conv_state, ssm_state)[0]

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry on from the states by (batch, length, d_model), and update them in place.

        Args:
            conv_state: (batch, d_inner, d_conv), the last inputs of the convolution, the newest last.
            ssm_state: (batch, d_inner, d_state).

        Returns y (batch, length, d_model) and the two states.
        """
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (batch, length, d_inner) each
        u = carried_convolution(x, conv_state, self.conv1d)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, final = ops.selective_scan(
            u,
            self.dt_proj(dt),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=ssm_state,
            return_final_state=True,
        )
        ssm_state.copy_(final)
        return self.out_proj(y), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states of a batch before its first token; their size does not depend on `max_seqlen`."""
        refuse_more(kwargs)
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype)


def carried_convolution(x: Tensor, conv_state: Tensor, conv1d: torch.nn.Conv1d) -> Tensor:
    """silu(conv1d(x)) of x (batch, length, channels) after the inputs in conv_state (batch, channels, width), which
    is updated in place."""
    width = conv_state.shape[2]
    before = conv_state[..., 1:].to(x.dtype)
    y = causal_conv1d_fn(
        x.transpose(1, 2), conv1d.weight.squeeze(1), conv1d.bias, initial_states=before, activation="silu"
    )
    assert isinstance(y, Tensor)
    newest = F.pad(x.transpose(1, 2)[..., -width:], (max(0, width - x.shape[1]), 0)).to(conv_state.dtype)
    if x.shape[1] < width:
        newest[..., : width - x.shape[1]] = conv_state[..., x.shape[1] :]
    conv_state.copy_(newest)
    return y.transpose(1, 2)


def refuse_more(arguments: dict[str, Any]) -> None:
    """Refuse arguments that mamba_ssm would take and ignore."""
    if arguments:
        raise NotServed(f"{', '.join(sorted(arguments))}: no such argument here; leave it out")
