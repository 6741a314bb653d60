"""`mamba_ssm.modules.mamba3.Mamba3`: its constructor, parameter names and states on `mambakit.nn.Mamba3`."""

from typing import Any

import torch
from torch import Tensor

from mambakit import nn
from mambakit.compat.inference import InferenceParams, states_of_layer
from mambakit.compat.mamba1 import refuse_more
from mambakit.compat.refusal import NotServed
from mambakit.compat.sequences import joined, runs_of
from mambakit.nn import Mamba3State


class Mamba3(nn.Mamba3):
    """The Mamba-3 mixer as mamba_ssm has it: `y = mamba(u, inference_params=...)`, both (batch, length, d_model).

    The arguments are mamba_ssm's; `chunk_size` is about speed alone and `n_layer` a label, as there. What mamba_ssm
    takes and ignores is refused: `dropout`, and arguments that it does not know. `is_mimo` needs a mimo_rank of 2 or
    more.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dropout != 0.0:
            raise NotServed(f"dropout={dropout}: the mixer has none, neither here nor in mamba_ssm; leave it out")
        if is_mimo and mimo_rank < 2:
            raise NotServed(f"is_mimo with mimo_rank={mimo_rank}: leave out is_mimo, which is then SISO")
        super().__init__(
            d_model,
            d_state,
            expand,
            headdim,
            ngroups,
            rope_fraction=rope_fraction,
            mimo_rank=mimo_rank if is_mimo else 1,
            A_floor=A_floor,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            output_norm=is_outproj_norm,
            device=device,
            dtype=dtype,
        )
        self.is_mimo, self.is_outproj_norm, self.nheads, self.num_bc_heads = (
            is_mimo,
            is_outproj_norm,
            self.heads,
            ngroups,
        )
        self.num_rope_angles, self.layer_idx, self.n_layer = self.n_angles, layer_idx, n_layer

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix (batch, length, d_model).

        seq_idx (batch, length) or cu_seqlens (sequences + 1,), with a batch of one, keep packed sequences apart (in
        mamba_ssm seq_idx is ignored). With `inference_params` its states are updated in place: from zero where its
        seqlen_offset is 0, else from where they stand, by as many tokens as there are.
        """
        if seq_idx is not None:
            if cu_seqlens is not None or inference_params is not None:
                raise NotServed("seq_idx with cu_seqlens or inference_params: give cu_seqlens alone")
            y, _ = super().forward(joined(u), cu_seqlens=runs_of(seq_idx, *u.shape[:2]).cu_seqlens)
            return y.view(u.shape)
        if inference_params is None:
            return super().forward(u, cu_seqlens=cu_seqlens)[0]
        sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        states = Mamba3State(*states_of_layer(self, inference_params, sequences))
        before = states if inference_params.seqlen_offset > 0 else None
        y, after = super().forward(u, before, cu_seqlens=cu_seqlens)
        for state, new in zip(states, after, strict=True):
            state.copy_(new)
        return y

    def step(  # type: ignore[override]
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One step of u (batch, d_model): y (batch, d_model) and the states, which are updated in place.

        They are angle_state (batch, heads, angles), ssm_state (batch, heads, headdim, d_state), k_state (batch, rank,
        heads, d_state) and v_state (batch, heads, headdim).
        """
        states = Mamba3State(angle_state, ssm_state, k_state, v_state)
        y, after = super().forward(u[:, None], states)
        for state, new in zip(states, after, strict=True):
            state.copy_(new)
        return y[:, 0], *states

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states of a batch before its first token; their size does not depend on `max_seqlen`."""
        refuse_more(kwargs)
        weight = self.in_proj.weight
        narrow: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": self.D.dtype}
        return (
            weight.new_zeros(batch_size, self.heads, self.n_angles, **wide),
            weight.new_zeros(batch_size, self.heads, self.headdim, self.d_state, **wide),
            weight.new_zeros(batch_size, self.mimo_rank, self.heads, self.d_state, **narrow),
            weight.new_zeros(batch_size, self.heads, self.headdim, **narrow),
        )
