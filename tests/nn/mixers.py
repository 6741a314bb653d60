"""One small layer of each mixer in float64: what the conformance test runs over."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mambakit.nn import S4D, Attention, AttentionState, Backbone, Mamba, Mamba2, Mamba3

WIDTH = 8


def mamba() -> nn.Module:
    return Mamba(WIDTH, d_state=3, d_conv=3, dtype=torch.float64)


def backbone_of_mamba() -> nn.Module:
    return Backbone(WIDTH, 2, mixer_options={"d_state": 3}, dtype=torch.float64)


def mamba2() -> nn.Module:
    return Mamba2(WIDTH, d_state=3, d_conv=3, headdim=4, n_groups=2, dtype=torch.float64)


def mamba2_without_norm() -> nn.Module:
    return Mamba2(WIDTH, d_state=3, headdim=8, D_has_hdim=True, rmsnorm=False, chunk_size=8, dtype=torch.float64)


def mamba3_with_norm() -> nn.Module:
    sizes = {"d_state": 4, "headdim": 4, "n_groups": 2, "chunk_size": 8}
    return Mamba3(WIDTH, **sizes, rope_fraction=1, output_norm=True, dtype=torch.float64)


def mamba3_mimo() -> nn.Module:
    return Mamba3(WIDTH, d_state=4, headdim=8, mimo_rank=2, chunk_size=8, dtype=torch.float64)


def s4d() -> nn.Module:
    return S4D(WIDTH, d_state=6, dtype=torch.float64)


def s4d_bilinear_legs() -> nn.Module:
    return S4D(WIDTH, 4, "bilinear", "legs", dtype=torch.float64)


def attention() -> nn.Module:
    return Attention(WIDTH, n_heads=2, dtype=torch.float64)


def attention_with_shared_keys_and_convolution() -> nn.Module:
    return Attention(WIDTH, n_heads=4, n_kv_heads=2, head_dim=6, rotary_dim=4, d_conv=3, dtype=torch.float64)


def hybrid_with_mlp() -> nn.Module:
    options = {"mamba2": {"d_state": 3, "headdim": 8}, "attention": {"n_heads": 2}}
    return Backbone(WIDTH, 3, ["mamba2", "attention", "s4d"], options, d_intermediate=6, dtype=torch.float64)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": mamba,
    "backbone of mamba": backbone_of_mamba,
    "mamba2": mamba2,
    "mamba2 without norm": mamba2_without_norm,
    "mamba3 with norm": mamba3_with_norm,
    "mamba3 mimo": mamba3_mimo,
    "s4d": s4d,
    "s4d bilinear legs": s4d_bilinear_legs,
    "attention": attention,
    "attention with shared keys and convolution": attention_with_shared_keys_and_convolution,
    "hybrid with mlp": hybrid_with_mlp,
}


def state_of_sequence(state: Any, index: int) -> Any:
    """The part of a state that belongs to one sequence of the batch or of the pack, padding cut away."""
    return tree_map(
        lambda part: part.of_sequence(index) if isinstance(part, AttentionState) else part[index : index + 1],
        state,
        is_leaf=lambda part: isinstance(part, AttentionState),
    )
