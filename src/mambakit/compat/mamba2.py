"""`mamba_ssm.modules.mamba2.Mamba2`: its constructor, parameter names and states on `mambakit.nn.Mamba2`."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import nn, ops
from mambakit.compat.inference import InferenceParams, states_of_layer
from mambakit.compat.mamba1 import carried_convolution, refuse_more
from mambakit.compat.refusal import NotServed
from mambakit.compat.scans import mamba_split_conv1d_scan_combined
from mambakit.errors import DataError
from mambakit.nn.linear import Linear


class Mamba2(nn.Mamba2):
    """The Mamba-2 mixer as mamba_ssm has it: `y = mamba(u, inference_params=...)`, both (batch, length, d_model).

    The arguments are mamba_ssm's. `chunk_size` and `use_mem_eff_path` are about speed and memory alone, and
    `sequence_parallel` about tensor parallelism, which `process_group` would ask for and which is refused. Rates and
    steps stay float32 where the model is cast to half precision.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object | None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if process_group is not None:
            raise NotServed("process_group: there is no tensor parallelism here; leave it out")
        d_inner = int(expand * d_model)
        super().__init__(
            d_inner if d_ssm is None else d_ssm,
            d_state,
            d_conv,
            1,
            headdim,
            ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            conv_bias=conv_bias,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.d_ssm, self.d_inner, self.d_model, self.expand = self.d_inner, d_inner, d_model, expand
        if self.d_ssm > d_inner:
            raise DataError(f"d_ssm must be at most expand * d_model = {d_inner}, got {d_ssm}")
        wide = 2 * d_inner + 2 * ngroups * d_state + self.heads
        self.in_proj = Linear(d_model, wide, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)
        if conv_init is not None:
            torch.nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.conv_init, self.D_has_hdim, self.rmsnorm = conv_init, D_has_hdim, rmsnorm
        self.norm_before_gate, self.use_mem_eff_path = norm_before_gate, use_mem_eff_path
        self.ngroups, self.nheads, self.activation = ngroups, self.heads, "silu"
        self.layer_idx, self.chunk_size = layer_idx, chunk_size
        self.process_group, self.sequence_parallel = process_group, sequence_parallel

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Mix along the length.

        Args:
            u: (batch, length, d_model), or with `seqlen` (batch * seqlen, d_model).
            seq_idx: (batch, length), the sequence of each position.
            cu_seqlens: (sequences + 1,) for a batch of one, in place of seq_idx or saying the same.
            inference_params: its states are updated in place: from zero where its seqlen_offset is 0, else from where
                they stand, by as many tokens as there are. Packed sequences have a state each, and the next calls
                carry on with a batch of that many.

        Returns y in the shape of u.
        """
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if cu_seqlens is not None:
            seq_idx = _numbers(cu_seqlens, seq_idx, rows)
        if inference_params is None:
            y = self._whole(rows, seq_idx, return_final_states=False)
            assert isinstance(y, Tensor)
        elif inference_params.seqlen_offset > 0:
            if seq_idx is not None:
                raise NotServed("packed sequences after the prompt: give one row to each sequence")
            y = self.step(rows, *states_of_layer(self, inference_params, rows.shape[0]))[0]
        else:
            y = self._prompt(rows, seq_idx, cu_seqlens, inference_params)
        return y.reshape(u.shape)

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry on from the states by (batch, length, d_model), and update them in place.

        conv_state is (batch, channels, d_conv), the newest input last; ssm_state (batch, heads, headdim, d_state).
        Returns y (batch, length, d_model) and the two states.
        """
        shared, mlp = self.n_groups * self.d_state, self.d_inner - self.d_ssm
        widths = [mlp, mlp, self.d_ssm, self.d_ssm + 2 * shared, self.heads]
        gate, passed, z, xBC, dt = self.in_proj(hidden_states).split(widths, dim=-1)
        xBC = carried_convolution(xBC, conv_state, self.conv1d)
        x, B, C = xBC.split([self.d_ssm, shared, shared], dim=-1)
        y, final = ops.ssd(
            x.unflatten(-1, (self.heads, self.headdim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.n_groups, -1)),
            C.unflatten(-1, (self.n_groups, -1)),
            self._skip(),
            z.unflatten(-1, (self.heads, self.headdim)) if self.norm is None else None,
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=ssm_state,
            return_final_state=True,
        )
        ssm_state.copy_(final)
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        if mlp > 0:
            y = torch.cat([F.silu(gate) * passed, y], dim=-1)
        return self.out_proj(y), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The states of a batch before its first token; their size does not depend on `max_seqlen`."""
        refuse_more(kwargs)
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, self.d_conv, weight.shape[0], dtype=dtype).transpose(1, 2)
        return conv, weight.new_zeros(batch_size, self.heads, self.headdim, self.d_state, dtype=dtype)

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (self.heads, self.headdim)) if self.D_has_hdim else self.D

    def _whole(self, rows: Tensor, seq_idx: Tensor | None, return_final_states: bool) -> Tensor | tuple[Tensor, Tensor]:
        return mamba_split_conv1d_scan_combined(
            self.in_proj(rows),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log),
            self._skip(),
            self.chunk_size or 256,
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            return_final_states=return_final_states,
            rmsnorm_weight=None if self.norm is None else self.norm.weight,
            rmsnorm_eps=1e-6 if self.norm is None else self.norm.eps,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.n_groups,
            norm_before_gate=self.norm_before_gate,
        )

    def _prompt(
        self, rows: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, inference_params: InferenceParams
    ) -> Tensor:
        if seq_idx is None:
            conv_state, ssm_state = states_of_layer(self, inference_params, rows.shape[0])
            conv_state.zero_()
            ssm_state.zero_()
            return self.step(rows, conv_state, ssm_state)[0]
        if cu_seqlens is None:
            raise NotServed("the states of packed sequences: give cu_seqlens, the bounds of the sequences")
        # A state for each sequence: each is a row of its own for the states' sake.
        bounds = cu_seqlens.tolist()
        conv_state, ssm_state = states_of_layer(self, inference_params, len(bounds) - 1)
        conv_state.zero_()
        ssm_state.zero_()
        pieces = [
            self.step(rows[:, begin:end], conv_state[i : i + 1], ssm_state[i : i + 1])[0]
            for i, (begin, end) in enumerate(itertools.pairwise(bounds))
            if end > begin
        ]
        return torch.cat(pieces, dim=1)


def _numbers(cu_seqlens: Tensor, seq_idx: Tensor | None, rows: Tensor) -> Tensor:
    """seq_idx (1, length) of cu_seqlens; where both are given they must say the same."""
    batch, length = rows.shape[:2]
    if batch != 1:
        raise DataError(f"cu_seqlens needs a batch of 1, got {batch}: lay the sequences end to end")
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or bool((cu_seqlens.diff() < 0).any()):
        raise DataError(f"cu_seqlens must rise from 0 to the length {length}, got {cu_seqlens.tolist()}")
    positions = torch.arange(length, device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens[1:].contiguous().long(), positions, right=True)[None]
    if seq_idx is not None:
        changes, others = (t[:, 1:] != t[:, :-1] for t in (numbers, seq_idx))
        if not torch.equal(changes, others):
            raise DataError("cu_seqlens and seq_idx disagree on where the sequences begin; give one of them")
    return numbers
