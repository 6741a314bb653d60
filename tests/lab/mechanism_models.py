"""Small models of every mixer in float64, parameters shaken so that none is zero or one, and a toy with a head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.nn import Backbone

WIDTH, LENGTH = 8, 7

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"d_state": 3, "bias": True}),
    "mamba with normed B, C and steps": ("mamba", {"d_state": 3, "b_c_dt_rms_eps": 1e-6}),
    "mamba2": ("mamba2", {"d_state": 3, "headdim": 4, "n_groups": 2}),
    "mamba2 without norm": ("mamba2", {"d_state": 3, "headdim": 8, "D_has_hdim": True, "rmsnorm": False}),
    "mamba2 normed before the gate": (
        "mamba2",
        {"d_state": 3, "headdim": 4, "norm_before_gate": True, "dt_limit": (0.5, 1.5)},
    ),
    "mamba3": ("mamba3", {"d_state": 4, "headdim": 4, "n_groups": 2}),
    "mamba3 with norm": ("mamba3", {"d_state": 4, "headdim": 4, "rope_fraction": 1, "output_norm": True}),
    "mamba3 mimo": ("mamba3", {"d_state": 4, "headdim": 8, "mimo_rank": 2}),
    "mamba3 mimo with norm": ("mamba3", {"d_state": 4, "headdim": 8, "mimo_rank": 2, "output_norm": True}),
}
GENERATIONS = ("mamba", "mamba2", "mamba3")


def backbone(case: str, *, layers: int = 2, mlp: int = 6) -> Backbone:
    name, options = CASES[case]
    return shaken(Backbone(WIDTH, layers, name, options, d_intermediate=mlp, dtype=torch.float64))


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def hidden(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


class Classifier(nn.Module):
    """Tokens to the logits of the last position, as the lab's models are."""

    def __init__(self, stack: Backbone, vocabulary: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH, dtype=torch.float64)
        self.stack = stack
        self.lm_head = nn.Linear(WIDTH, vocabulary, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.stack(self.embedding(tokens))[0][:, -1])


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(11, (batch, length))


def edited(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: change(tensor.clone())
