"""The network: inputs to hidden vectors, a recurrent stack, hidden vectors to predictions, one a step.

    hidden, state = stack(embed(inputs), state)
    prediction    = head(dropout(hidden))

The stack is a Backbone of one of the core's mixers, or a GRU or LSTM of as many parameters. The head starts at zero, so
that training starts from the mean (or, with a residual head, from ridge) and not from noise.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mambakit.nn import Backbone
from mambakit.stream.config import RIVALS, StreamConfig
from mambakit.stream.plain.features import FEATURES_PER_INPUT

RIVAL_LAYERS = 2  # what contestants found best; four layers train worse


class StreamModel(nn.Module):
    """Predictions at every step: `y, state = model(inputs, state)`.

    Args:
        config: kind and sizes.
        inputs: numbers in a state, before features are made of them.
        targets: numbers in a prediction.
    """

    def __init__(self, config: StreamConfig, inputs: int, targets: int) -> None:
        super().__init__()
        self.config = config
        self.inputs, self.targets = inputs, targets
        read = inputs * (FEATURES_PER_INPUT if config.features == "engineered" else 1)
        if config.kind in RIVALS:
            width = _width_of_equal_size(config, read, targets)
            kind = nn.GRU if config.kind == "gru" else nn.LSTM
            self.stack: nn.Module = kind(width, width, RIVAL_LAYERS, batch_first=True)
        else:
            width = config.d_model
            self.stack = Backbone(width, config.n_layers, config.kind, config.mixer_options())
        self.width = width
        self.embed = nn.Linear(read, width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, targets)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """inputs (batch, steps, inputs or features) to predictions (batch, steps, targets) and the final state.

        While training, gradients flow back over `context_length` steps at most; the state is carried over all.
        """
        hidden = self.embed(inputs)
        parts: list[Tensor] = []
        # Without gradients there is nothing to cut.
        context = (
            self.config.context_length if self.training and self.config.context_length else max(1, hidden.shape[1])
        )
        for window in hidden.split(context, dim=1):
            if parts:
                state = tree_map(torch.Tensor.detach, state)
            hidden_of_window, state = self.stack(window, state)
            parts.append(hidden_of_window)
        return self.head(self.dropout(torch.cat(parts, dim=1))), state


def untrained_model(config: StreamConfig, inputs: int, targets: int, seed: int) -> StreamModel:
    """A network with initial weights drawn by the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StreamModel(config, inputs, targets)


def _width_of_equal_size(config: StreamConfig, read: int, targets: int) -> int:
    """The width at which a GRU or LSTM has about as many parameters as the Mamba of this d_model and n_layers."""
    mamba = config.model_copy(update={"kind": "mamba"})
    with torch.device("meta"):
        stack = Backbone(mamba.d_model, mamba.n_layers, "mamba", mamba.mixer_options())
    wanted = sum(parameter.numel() for parameter in stack.parameters())
    wanted += mamba.d_model * (read + 1) + targets * (mamba.d_model + 1)
    gates = 3 if config.kind == "gru" else 4

    def parameters(width: int) -> int:
        layer = gates * (2 * width * width + 2 * width)
        return RIVAL_LAYERS * layer + width * (read + 1) + targets * (width + 1)

    width = 1
    while parameters(width + 1) <= wanted:
        width += 1
    return width
