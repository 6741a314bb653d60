"""Tiny random models of the nine families of transformers that look for mamba_ssm and causal_conv1d.

Run as a program, `families.py FAMILY FILE [--stand-ins]`, it computes logits, gradients and generated tokens of one
family and writes them to FILE: the look-up happens once a process, so before and after are two processes.
"""

import argparse
import sys
from pathlib import Path

VOCABULARY, LENGTH, BATCH = 37, 21, 2
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LAYERS = {"num_hidden_layers": 2}
OF_MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}

# family -> (prefix of its classes, sizes)
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "mamba": ("Mamba", {**SMALL, **LAYERS, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {**SMALL, **LAYERS, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    ),
    "falcon_mamba": ("FalconMamba", {**SMALL, **LAYERS, "state_size": 8}),
    "jamba": (
        "Jamba",
        {
            **SMALL,
            **LAYERS,
            **HEADS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("Bamba", {**SMALL, **LAYERS, **HEADS, **OF_MAMBA_2, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        {
            **SMALL,
            **HEADS,
            "num_hidden_layers": 3,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "adapter_rank": 4,
            "use_mem_rope": False,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **SMALL,
            **HEADS,
            "layers_block_type": ["mamba", "attention", "mamba"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **SMALL,
            **LAYERS,
            **HEADS,
            **OF_MAMBA_2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
        },
    ),
    "falcon_h1": ("FalconH1", {**SMALL, **LAYERS, **HEADS, **OF_MAMBA_2, "mamba_d_ssm": 64, "head_dim": 8}),
}


def make(family: str):
    """The model and its class's module, with the same weights in every process."""
    import importlib

    import torch

    prefix, sizes = FAMILIES[family]
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    model = getattr(modeling, f"{prefix}ForCausalLM")(getattr(configuration, f"{prefix}Config")(**sizes))
    for weight in model.parameters():  # so that no part of it is lost in the rounding of another
        if weight.dim() > 1 and weight.requires_grad:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 / 2)
    return model, modeling


def results(family: str) -> dict[str, object]:
    """Logits and gradients in training and in evaluation, generated tokens, and which kernels were called."""
    import torch

    model, modeling = make(family)
    calls = _count_calls(modeling)
    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    found: dict[str, object] = {}
    for mode in ("train", "eval"):
        getattr(model, mode)()
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        logits.float().logsumexp(-1).square().mean().backward()
        found[f"{mode} logits"] = logits.detach()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[f"{mode} gradient of {name}"] = weight.grad
    found["generated"] = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False
    )
    found["calls"] = calls
    return found


def _count_calls(modeling) -> dict[str, int]:
    """Counts what reaches the stand-ins."""
    import functools

    calls: dict[str, int] = {}
    if "mambakit.compat.scans" not in sys.modules:
        return calls
    for function in list(vars(modeling).values()):
        for cell in getattr(function, "__closure__", None) or ():
            held = cell.cell_contents
            if callable(held) and getattr(held, "__module__", "").startswith("mambakit.compat"):

                @functools.wraps(held)
                def counted(*args, _held=held, _name=held.__name__, **kwargs):
                    calls[_name] = calls.get(_name, 0) + 1
                    return _held(*args, **kwargs)

                cell.cell_contents = counted
    return calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family")
    parser.add_argument("file", type=Path)
    parser.add_argument("--stand-ins", action="store_true")
    options = parser.parse_args()
    if options.stand_ins:
        import mambakit.compat

        mambakit.compat.install()
    import torch

    torch.save(results(options.family), options.file)


if __name__ == "__main__":
    main()
