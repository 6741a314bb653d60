"""The format of mamba-ssm: Mamba-1, -2, -3, and hybrids with attention.

Its embedding is called `backbone.embedding`; all other tensors have our names. A config.json carries only what differs
from mamba-ssm's defaults.
"""

from typing import Any

from mambakit.errors import ArtefactError
from mambakit.lm.config import MambaConfig

_EPSILON = 1e-5  # of every norm; the format has no place for another
_MLP_MULTIPLE = 128  # to which mamba-ssm rounds up the width of its MLP
_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}
# Names of mamba-ssm's arguments, and of ours.
_DT = {name: name for name in ("dt_min", "dt_max", "dt_init_floor")}
_OPTIONS: dict[str, dict[str, str]] = {
    "mamba": _DT | {name: name for name in ("d_state", "d_conv", "expand", "dt_rank", "dt_scale", "conv_bias", "bias")},
    "mamba2": _DT
    | {name: name for name in ("d_state", "d_conv", "expand", "headdim", "A_init_range", "dt_limit", "D_has_hdim")}
    | {name: name for name in ("rmsnorm", "norm_before_gate", "chunk_size", "conv_bias", "bias")}
    | {"ngroups": "n_groups"},
    # mamba-ssm's Mamba3 takes and ignores arguments that it does not know, so A_activation can be kept here.
    "mamba3": _DT
    | {name: name for name in ("d_state", "expand", "headdim", "rope_fraction", "A_floor", "A_activation")}
    | {"ngroups": "n_groups", "is_outproj_norm": "output_norm", "chunk_size": "chunk_size"},
    "attention": {
        "num_heads": "n_heads",
        "num_heads_kv": "n_kv_heads",
        "head_dim": "head_dim",
        "rotary_emb_dim": "rotary_dim",
        "rotary_emb_base": "rotary_base",
        "d_conv": "d_conv",
    },
}
# Arguments that choose a kernel or an initialisation, and no function.
_WITHOUT_EFFECT = {"use_fast_path", "use_mem_eff_path", "dt_init", "conv_init", "dropout", "n_layer"}
# Arguments that our layers have no equal of, and the value that they have to have.
_ONLY: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"d_ssm": None, "sequence_parallel": True, "process_group": None},
    "mamba3": {},
    "attention": {"causal": True, "softmax_scale": None, "rotary_emb_interleaved": False, "mlp_dim": 0},
}


def recognises(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "model_type" not in settings and {"d_model", "n_layer"} <= set(settings)


def read(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our MambaConfig from a config.json; what it leaves out has mamba-ssm's defaults.

    Raises ArtefactError for a setting that our model has no equal of.
    """
    if unknown := set(settings) - set(_DEFAULTS):
        raise ArtefactError(f"config.json has the setting {sorted(unknown)[0]}, which this version does not know")
    whole = {**_DEFAULTS, **settings}
    if not whole["rms_norm"]:
        raise ArtefactError("config.json asks for rms_norm: false (LayerNorm): only RMS norms are supported")
    ssm = dict(whole["ssm_cfg"])
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _LAYERS:
        raise ArtefactError(f"config.json asks for the layer {layer}: expected one of {', '.join(_LAYERS)}")
    name, attended = _LAYERS[layer], set(whole["attn_layer_idx"])
    mixers = ["attention" if index in attended else name for index in range(whole["n_layer"])]
    options = {name: _read_options(name, ssm)} if name in mixers else {}
    if attended:
        options["attention"] = _read_options("attention", whole["attn_cfg"])
    alone = len(set(mixers)) == 1
    multiple = whole["pad_vocab_size_multiple"]
    return {
        "vocab_size": _rounded_up(whole["vocab_size"], multiple),
        "hidden_size": whole["d_model"],
        "num_hidden_layers": whole["n_layer"],
        "mixer": mixers[0] if alone else mixers,
        "mixer_options": options[mixers[0]] if alone else options,
        "mlp_size": _rounded_up(whole["d_intermediate"], _MLP_MULTIPLE),
        "layer_norm_epsilon": _EPSILON,
        "residual_in_fp32": whole["residual_in_fp32"],
        "pad_vocab_size_multiple": multiple,
        "tie_word_embeddings": whole["tie_embeddings"],
    }


def write(config: MambaConfig) -> dict[str, Any]:
    """The config.json of a model; raises ArtefactError, saying why, for one that mamba-ssm can't build."""
    names = set(config.mixers)
    kinds = names - {"attention"}
    if len(kinds) > 1 or not kinds <= set(_LAYERS.values()):
        raise ArtefactError(
            f"mamba-ssm has one of {', '.join(_LAYERS)} beside attention, got {' and '.join(sorted(kinds))}"
        )
    epsilons = {config.layer_norm_epsilon, *(config.options_of(name).get("norm_eps", _EPSILON) for name in names)}
    if epsilons != {_EPSILON}:
        raise ArtefactError(f"mamba-ssm adds {_EPSILON} in every norm, got {', '.join(map(str, sorted(epsilons)))}")
    if config.mlp_size % _MLP_MULTIPLE != 0:
        raise ArtefactError(f"mlp_size must be a multiple of {_MLP_MULTIPLE} in mamba-ssm, got {config.mlp_size}")
    name = next(iter(kinds), "mamba")
    layer = next(theirs for theirs, ours in _LAYERS.items() if ours == name)
    return {
        **_DEFAULTS,
        "d_model": config.hidden_size,
        "d_intermediate": config.mlp_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer, **(_write_options(name, config.options_of(name)) if kinds else {})},
        "attn_layer_idx": [index for index, mixer in enumerate(config.mixers) if mixer == "attention"],
        "attn_cfg": _write_attention(config) if "attention" in names else {},
        "residual_in_fp32": config.residual_in_fp32,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_word_embeddings,
    }


def our_name(name: str) -> str:
    """Our name of one of the format's tensors."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def their_name(name: str) -> str:
    """The format's name of one of our tensors."""
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def _read_options(name: str, theirs: dict[str, Any]) -> dict[str, Any]:
    theirs = {key: value for key, value in theirs.items() if key not in _WITHOUT_EFFECT}
    for key, only in _ONLY[name].items():
        # mamba-ssm's attention is not causal unless it is told to be.
        given = theirs.pop(key, False if key == "causal" else only)
        if given != only:
            raise ArtefactError(f"config.json asks for {key}={given!r} in its {name}: only {only!r} is supported")
    options: dict[str, Any] = {}
    if name == "attention":
        biases = {theirs.pop(key, True) for key in ("qkv_proj_bias", "out_proj_bias")}
        if len(biases) > 1:
            raise ArtefactError("config.json gives one of attention's projections a bias: only both or none")
        options["bias"] = biases.pop()
        theirs.setdefault("rotary_emb_dim", 0)
    if name == "mamba3":
        options["mimo_rank"] = theirs.pop("mimo_rank", 4) if theirs.pop("is_mimo", False) else 1
        theirs.pop("mimo_rank", None)
    for key, value in theirs.items():
        if key not in _OPTIONS[name]:
            raise ArtefactError(f"config.json has the setting {key} of {name}, which this version does not know")
        options[_OPTIONS[name][key]] = value
    return options


def _write_options(name: str, ours: dict[str, Any]) -> dict[str, Any]:
    backwards = {ours: theirs for theirs, ours in _OPTIONS[name].items()}
    written: dict[str, Any] = {}
    ours.pop("norm_eps", None)
    if ours.get("b_c_dt_rms_eps", 0.0) is None:
        ours.pop("b_c_dt_rms_eps")
    if ours.get("chunk_size", 0) is None:  # our choice, which changes no result
        ours.pop("chunk_size")
    if name == "mamba3" and (rank := ours.pop("mimo_rank", 1)) > 1:
        written |= {"is_mimo": True, "mimo_rank": rank}
    for key, value in ours.items():
        if key not in backwards:
            raise ArtefactError(f"mamba-ssm's {name} has no {key}: choose the format hf")
        written[backwards[key]] = list(value) if isinstance(value, tuple) else value
    return written


def _write_attention(config: MambaConfig) -> dict[str, Any]:
    ours = config.options_of("attention")
    bias = ours.pop("bias", False)
    head_dim = ours.get("head_dim") or config.hidden_size // ours["n_heads"]
    if ours.get("rotary_dim") is None:
        ours["rotary_dim"] = head_dim
    written = _write_options("attention", ours)
    return {"causal": True, **written, "qkv_proj_bias": bias, "out_proj_bias": bias}


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
