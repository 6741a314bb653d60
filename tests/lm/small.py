"""Small models of every family, ours and transformers', and tokens for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from mambakit.lm import MambaConfig, MambaForCausalLM  # noqa: E402

VOCABULARY = 40
FAMILIES: dict[str, dict] = {
    "mamba": {"mixer": "mamba", "mixer_options": {"d_state": 4}},
    "falcon_mamba": {"mixer": "mamba", "mixer_options": {"d_state": 4, "b_c_dt_rms_eps": 1e-6}},
    "mamba2": {"mixer": "mamba2", "mixer_options": {"d_state": 8, "headdim": 8, "n_groups": 2}},
    "mamba3": {"mixer": "mamba3", "mixer_options": {"d_state": 8, "headdim": 8}},
    "hybrid": {
        "mixer": ["mamba2", "attention"],
        "mixer_options": {"mamba2": {"d_state": 8, "headdim": 8}, "attention": {"n_heads": 2}},
        "mlp_size": 128,
    },
}


def model_of(family: str, **settings: object) -> MambaForCausalLM:
    """A model of ours with random weights, in eval mode."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": False}
    whole = {**sizes, **FAMILIES[family], **settings}
    model = MambaForCausalLM(MambaConfig(**whole)).eval()
    with torch.no_grad():  # so that logits differ by more than rounding
        for weight in {model.get_input_embeddings().weight, model.lm_head.weight}:
            weight.mul_(20)
    return model


def _stock(name: str, **settings: object) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, **settings
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(20)
        return model

    return build


STOCK = {
    "mamba": _stock("Mamba", state_size=4, use_bias=True),
    "falcon_mamba": _stock("FalconMamba", state_size=4, tie_word_embeddings=False),
    "mamba2": _stock("Mamba2", state_size=8, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
}


def tokens(batch: int, length: int) -> Tensor:
    """Tokens (batch, length) without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))
