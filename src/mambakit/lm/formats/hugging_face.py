"""The format of transformers: Mamba, Mamba-2 and FalconMamba.

Tensors have our names; configurations are told apart by `model_type`.
"""

import math
from typing import Any

from mambakit.errors import ArtefactError
from mambakit.lm.config import MambaConfig

# Names of transformers' settings, and of ours; those of the mixer are its arguments.
_MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_EVERY_MIXER = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
_MAMBA = {**_EVERY_MIXER, "time_step_rank": "dt_rank", "time_step_scale": "dt_scale"}
_MIXERS = {
    "mamba": _MAMBA,
    "falcon_mamba": {**_MAMBA, "mixer_rms_eps": "b_c_dt_rms_eps"},
    "mamba2": {
        **_EVERY_MIXER,
        "head_dim": "headdim",
        "n_groups": "n_groups",
        "chunk_size": "chunk_size",
        "time_step_limit": "dt_limit",
    },
}
# Settings that the format can't express, and their only value in it.
_FIXED = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False},
}
_ONLY_AT_INITIALISATION = {"A_init_range"}
_CLASSES = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}


def recognises(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return settings.get("model_type") in _MIXERS


def read(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our MambaConfig from a config.json; what it leaves out has transformers' defaults.

    Raises ArtefactError for a setting that our model has no equal of.
    """
    kind = settings["model_type"]
    whole = {**_defaults(kind), **settings}
    if whole["hidden_act"] not in ("silu", "swish"):
        raise ArtefactError(f"config.json asks for hidden_act {whole['hidden_act']!r}: only silu is supported")
    options = {ours: whole[theirs] for theirs, ours in _MIXERS[kind].items()}
    if kind == "mamba2":
        options["dt_limit"] = [float(bound) for bound in whole["time_step_limit"]]
        options["norm_eps"] = whole["layer_norm_epsilon"]
        if whole["num_heads"] * whole["head_dim"] != whole["expand"] * whole["hidden_size"]:
            raise ArtefactError(
                f"config.json is inconsistent: num_heads * head_dim = {whole['num_heads'] * whole['head_dim']}, "
                f"expected expand * hidden_size = {whole['expand'] * whole['hidden_size']}"
            )
    return {
        **{ours: whole[theirs] for theirs, ours in _MODEL.items()},
        "mixer": "mamba2" if kind == "mamba2" else "mamba",
        "mixer_options": options,
    }


def write(config: MambaConfig) -> dict[str, Any]:
    """The config.json of a model.

    Raises ArtefactError, saying why, for a model that transformers has no class for.
    """
    kind = _kind(config)
    options, names = config.options_of(config.mixers[0]), _MIXERS[kind]
    for name, only in _FIXED[kind].items():
        if options.pop(name, only) != only:
            raise ArtefactError(f"transformers' {_CLASSES[kind]} has no {name}: choose the format state-spaces")
    norm_eps = options.pop("norm_eps", 1e-5)
    if kind == "mamba2" and norm_eps != config.layer_norm_epsilon:
        raise ArtefactError(
            f"transformers' Mamba2 has one epsilon for all norms, got norm_eps={norm_eps} beside "
            f"layer_norm_epsilon={config.layer_norm_epsilon}"
        )
    backwards = {ours: theirs for theirs, ours in names.items()}
    written = {**_defaults(kind), **_defaults_of_our_mixer(kind)}
    for name, value in options.items():
        if name in backwards:
            written[backwards[name]] = value
        elif name not in _ONLY_AT_INITIALISATION:
            raise ArtefactError(f"transformers' {_CLASSES[kind]} has no {name}: choose the format state-spaces")
    written |= {theirs: getattr(config, ours) for theirs, ours in _MODEL.items()}
    inner = int(written["expand"] * config.hidden_size)
    if kind == "mamba2":
        written |= {"num_heads": inner // written["head_dim"], "chunk_size": written["chunk_size"] or 256}
        written["time_step_limit"] = list(written["time_step_limit"])
    else:
        rank = written["time_step_rank"]
        written["time_step_rank"] = math.ceil(config.hidden_size / 16) if rank == "auto" else rank
        written["intermediate_size"] = inner
    dtype = getattr(config, "dtype", None)
    named = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return {**written, **named, "model_type": kind, "architectures": [f"{_CLASSES[kind]}ForCausalLM"]}


def _kind(config: MambaConfig) -> str:
    mixers = set(config.mixers)
    if len(mixers) > 1 or config.mlp_size or not mixers <= {"mamba", "mamba2"}:
        what = "an MLP" if config.mlp_size else "a hybrid" if len(mixers) > 1 else mixers.pop()
        raise ArtefactError(f"transformers has no Mamba with {what}: choose the format state-spaces")
    if mixers == {"mamba2"}:
        return "mamba2"
    return "mamba" if config.options_of("mamba").get("b_c_dt_rms_eps") is None else "falcon_mamba"


def _defaults(kind: str) -> dict[str, Any]:
    """What transformers takes where a config.json is silent."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    names = {*_MODEL, *_MIXERS[kind], "hidden_act"} | ({"num_heads"} if kind == "mamba2" else set())
    found = {name: getattr(config, name) for name in names}
    if kind != "mamba2":
        found["time_step_rank"] = "auto"  # transformers has put a number in its place
    return found


def _defaults_of_our_mixer(kind: str) -> dict[str, Any]:
    """Where our mixer's defaults differ from transformers'."""
    return {"n_groups": 1, "chunk_size": 256} if kind == "mamba2" else {}
