"""The format of llama.cpp: Mamba-1 (FalconMamba among them) and Mamba-2, as its architectures mamba and mamba2.

Tensors are blk.{i}.ssm_{in,conv1d,x,dt,a,d,norm,out}, with ssm_a = -exp(A_log); settings go by `{architecture}.ssm.*`.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambakit.errors import ArtefactError
from mambakit.nn import Mamba, Mamba2

if TYPE_CHECKING:
    from mambakit.lm.model import MambaForCausalLM

_CONTEXT = 2**20  # llama.cpp wants a number; the state has no bound
_EXPAND = 2  # of Mamba-1, the only one that llama.cpp takes
# Kept in float32 whatever the type of the file: llama.cpp reads them as nothing else.
_ALWAYS_FLOAT32 = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight")


def settings(model: "MambaForCausalLM") -> dict[str, Any]:
    """The architecture's metadata by key, `general.architecture` first.

    Raises ArtefactError, saying why, for a model that llama.cpp has no equal of.
    """
    kind, mixer = _kind(model), _mixers(model)[0]
    sizes = {
        "context_length": _CONTEXT,
        "embedding_length": model.config.hidden_size,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": model.config.num_hidden_layers,
        "attention.layer_norm_rms_epsilon": float(model.config.layer_norm_epsilon),
        "vocab_size": model.config.vocab_size,
        "ssm.conv_kernel": mixer.d_conv,
        "ssm.inner_size": mixer.d_inner,
        "ssm.state_size": mixer.d_state,
    }
    if isinstance(mixer, Mamba):
        sizes |= {"ssm.time_step_rank": mixer.dt_rank, "ssm.dt_b_c_rms": mixer.b_c_dt_rms_eps is not None}
    else:
        sizes |= {"ssm.time_step_rank": mixer.heads, "ssm.group_count": mixer.n_groups}
    return {"general.architecture": kind, **{f"{kind}.{name}": value for name, value in sizes.items()}}


def notes(model: "MambaForCausalLM") -> list[str]:
    """Where llama.cpp computes something else than this model, a sentence each."""
    eps, found = model.config.layer_norm_epsilon, set()
    for mixer in _mixers(model):
        inner = mixer.b_c_dt_rms_eps if isinstance(mixer, Mamba) else mixer.norm and mixer.norm.eps
        found |= {inner} - {None, eps}
    return [f"llama.cpp has one epsilon for all norms: it adds {eps} where this model adds {own}" for own in found]


def tensors(model: "MambaForCausalLM") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by name, in float32."""
    tied = model.config.tie_word_embeddings
    yield "token_embd.weight", _wide(model.backbone.embeddings.weight)
    yield "output_norm.weight", _wide(model.backbone.norm_f.weight)
    if not tied:
        yield "output.weight", _wide(model.lm_head.weight)
    layers: Any = model.backbone.layers
    for index, layer in enumerate(layers):
        named = {"attn_norm.weight": layer.norm.weight, **_of_mixer(layer.mixer)}
        for name, tensor in named.items():
            yield f"blk.{index}.{name}", _wide(tensor)


def stays_float32(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is float32 in a file of any type."""
    return tensor.dim() < 2 or name.endswith(_ALWAYS_FLOAT32)


def _of_mixer(mixer: Mamba | Mamba2) -> dict[str, Tensor]:
    convolution = mixer.conv1d
    bias = convolution.bias
    common = {
        "ssm_in.weight": mixer.in_proj.weight,
        "ssm_conv1d.weight": convolution.weight.squeeze(1),  # (channels, width)
        # llama.cpp always adds one
        "ssm_conv1d.bias": torch.zeros(convolution.out_channels) if bias is None else bias,
        "ssm_out.weight": mixer.out_proj.weight,
    }
    rates = -torch.exp(mixer.A_log.detach().float())
    if isinstance(mixer, Mamba):
        return {
            **common,
            "ssm_x.weight": mixer.x_proj.weight,
            "ssm_dt.weight": mixer.dt_proj.weight,
            "ssm_dt.bias": mixer.dt_proj.bias,
            "ssm_a": rates,
            "ssm_d": mixer.D,
        }
    assert mixer.norm is not None
    return {
        **common,
        "ssm_dt.bias": mixer.dt_bias,
        "ssm_a": rates[:, None],  # (heads, 1)
        "ssm_d": mixer.D[:, None],
        "ssm_norm.weight": mixer.norm.weight.unflatten(0, (mixer.n_groups, -1)),
    }


def _kind(model: "MambaForCausalLM") -> str:
    config, kinds = model.config, sorted(set(model.config.mixers))
    if len(kinds) > 1 or config.mlp_size or kinds[0] not in ("mamba", "mamba2"):
        what = "an MLP" if config.mlp_size else " and ".join(kinds)
        raise ArtefactError(f"llama.cpp has pure Mamba-1 and Mamba-2, got {what}: choose the format state-spaces")
    for mixer in _mixers(model):
        if problem := _problem(mixer):
            raise ArtefactError(f"llama.cpp's {kinds[0]} has no {problem}: choose the format hf or state-spaces")
    return kinds[0]


def _problem(mixer: Mamba | Mamba2) -> str:
    """What llama.cpp can't do of a mixer; empty where there is nothing."""
    if mixer.in_proj.bias is not None:
        return "biases of the projections"
    if isinstance(mixer, Mamba):
        wanted = _EXPAND * mixer.d_model
        return "" if mixer.d_inner == wanted else f"d_inner of {mixer.d_inner} (it wants {wanted})"
    if mixer.norm is None:
        return "mixer without a norm (rmsnorm=False)"
    if mixer.norm.norm_before_gate:
        return "norm_before_gate"
    if tuple(mixer.dt_limit) != (0.0, math.inf):
        return f"dt_limit, here {list(mixer.dt_limit)}"
    return "" if mixer.D.shape[0] == mixer.heads else "D for each channel (D_has_hdim)"


def _mixers(model: "MambaForCausalLM") -> list[Mamba | Mamba2]:
    layers: Any = model.backbone.layers
    return [layer.mixer for layer in layers]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
