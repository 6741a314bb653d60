"""Small random models of the nine families of transformers that look for mamba_ssm and causal_conv1d."""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

VOCABULARY = 37

# family -> prefix of its classes
FAMILIES = {
    "mamba": "Mamba",
    "falcon_mamba": "FalconMamba",
    "jamba": "Jamba",
    "mamba2": "Mamba2",
    "bamba": "Bamba",
    "zamba2": "Zamba2",
    "nemotron_h": "NemotronH",
    "granitemoehybrid": "GraniteMoeHybrid",
    "falcon_h1": "FalconH1",
}


# What leaves a hybrid family its recurrent layers alone.
WITHOUT_ATTENTION: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": []},
    "nemotron_h": {"layers_block_type": ["mamba"] * 3},
    "granitemoehybrid": {"layer_types": ["mamba"] * 2},
}


def sizes_of(
    family: str, hidden: int = 32, state: int = 8, chunk: int = 8, *, attention: bool = True
) -> dict[str, Any]:
    """What the configuration of a family takes; d_inner is 2 hidden, in heads of 16."""
    heads = hidden // 8
    common = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    hybrid = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": hidden + 16}
    inner = {
        "mamba_n_heads": heads,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": state,
        "mamba_chunk_size": chunk,
        "mamba_expand": 2,
    }
    experts = {"num_experts_per_tok": 1}
    own: dict[str, dict[str, Any]] = {
        "mamba": {"state_size": state},
        "falcon_mamba": {"state_size": state},
        "jamba": {
            **hybrid,
            **experts,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": state,
            "mamba_dt_rank": 4,
        },
        "mamba2": {"state_size": state, "num_heads": heads, "head_dim": 16, "n_groups": 2, "chunk_size": chunk},
        "bamba": {**hybrid, **inner, "attn_layer_indices": [1]},
        "zamba2": {
            **hybrid,
            "num_hidden_layers": 3,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": state,
            "mamba_ngroups": 2,
            "n_mamba_heads": heads,
            "chunk_size": chunk,
            "adapter_rank": 4,
            "use_mem_rope": False,
        },
        "nemotron_h": {
            **hybrid,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mamba"],
            "head_dim": 8,
            "mamba_num_heads": heads,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": state,
            "chunk_size": chunk,
        },
        "granitemoehybrid": {
            **hybrid,
            **inner,
            **experts,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "shared_intermediate_size": 16,
        },
        "falcon_h1": {**hybrid, **inner, "mamba_d_ssm": 2 * hidden, "head_dim": 8},
    }
    return {**common, **tokens, **own[family], **({} if attention else WITHOUT_ATTENTION[family])}


def modeling_of(family: str) -> ModuleType:
    """The modeling file of a family, imported anew: it then looks for its kernels again."""
    name = f"transformers.models.{family}.modeling_{family}"
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def make(family: str, modeling: ModuleType, **sizes: Any) -> torch.nn.Module:
    """A model of `sizes_of`, with the same weights at every call, all large enough to count."""
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configuration, f"{FAMILIES[family]}Config")(**sizes_of(family, **sizes))
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(modeling, f"{FAMILIES[family]}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and weight.requires_grad:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 / 2)
        elif name.endswith("conv1d.bias"):
            torch.nn.init.normal_(weight, std=0.5)
    return model
