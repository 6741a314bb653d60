"""The network with a GRU in the place of its Mamba blocks: as many parameters, the same heads, loss and training."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.forecast.dataset import PreparedSeries
from mambakit.forecast.predictions import Predictions

if TYPE_CHECKING:
    from mambakit.training import TrainingConfig


class GRUBackbone(nn.Module):
    """torch's GRU, brought back to the width of the residual stream, and the final norm: called as a Backbone is.

    Args:
        d_model: width of the hidden vectors in and out.
        num_layers: GRU layers.
        hidden_size: width of the GRU's state.
    """

    def __init__(self, d_model: int, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d_model, hidden_size, num_layers, batch_first=True)
        self.out_proj = nn.Linear(hidden_size, d_model, bias=False)
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, hidden: Tensor, state: Tensor | None = None) -> tuple[Tensor, Any]:
        """hidden (batch, length, d_model) in and out; state (layers, batch, hidden_size)."""
        hidden, state = self.gru(hidden, state)
        return self.norm_f(self.out_proj(hidden)), state


def gru_of_size(d_model: int, num_layers: int, parameters: int) -> GRUBackbone:
    """The GRU backbone whose number of parameters is nearest to this one."""

    def excess(hidden_size: int) -> int:
        first = 3 * hidden_size * (d_model + hidden_size + 2)
        others = (num_layers - 1) * 3 * hidden_size * (2 * hidden_size + 2)
        return first + others + d_model * hidden_size + d_model - parameters

    size = 1
    while excess(size + 1) <= 0:
        size += 1
    return GRUBackbone(d_model, num_layers, size if -excess(size) <= excess(size + 1) else size + 1)


def gru(
    prepared: PreparedSeries, samples: np.ndarray, training: "TrainingConfig", *, quiet: bool = True
) -> Predictions:
    """Train it as the model is trained, and forecast."""
    from mambakit.forecast.train import network_predictions, train_network, untrained_model

    config = prepared.config
    like = untrained_model(prepared, training.seed)
    size = sum(parameter.numel() for parameter in like.backbone.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        backbone = gru_of_size(config.d_model, config.num_layers, size)
    model, _ = train_network(prepared, training, backbone=backbone, quiet=quiet, description="gru")
    return network_predictions(model, prepared.part(samples))
