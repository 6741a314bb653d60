"""A training step, forward and backward with the gradient of every parameter, of a small stack of layers.

At several lengths, because transformers' backward grows with the square of the length where no CUDA kernel serves it.
"""

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Goal, Peer, Run
from benchmarks.cases.mixer import mixer_floor
from benchmarks.floors import Floor, Rates
from benchmarks.passes import forward_and_backward
from mambakit.nn import Backbone, Mamba

LAYERS, D_MODEL, BATCH = 4, 128, 8
LSTM_WIDTH = 256  # the inner width of a mixer of d_model 128


def cases(length: int = 512, short_lengths: tuple[int, ...] = (64, 128)) -> list[Case]:
    """At the length that the goals name, and at shorter ones to show how each grows."""
    return [
        *(_case(short, lstm_goal=None, transformers_goal=None, once=False) for short in short_lengths),
        _case(length, lstm_goal=Goal(2), transformers_goal=Goal(200), once=True),
    ]


def _case(length: int, lstm_goal: Goal | None, transformers_goal: Goal | None, once: bool) -> Case:
    return Case(
        f"training step, length {length}",
        f"{LAYERS} layers, ({BATCH}, {length}, {D_MODEL})",
        lambda: _hidden(length, D_MODEL),
        _ours,
        (
            Peer(f"torch.nn.LSTM, width {LSTM_WIDTH}", lambda x: _lstm(length), lstm_goal),
            Peer("mambapy", _mambapy),
            Peer("transformers", _transformers, transformers_goal, once),
        ),
        lambda rates: _floor(rates, length),
    )


def _hidden(length: int, width: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, length, width)


def _ours(x: Tensor) -> Run:
    model = Backbone(D_MODEL, LAYERS)
    return forward_and_backward(lambda: model(x)[0], model.parameters())


def _lstm(length: int) -> Run:
    model = nn.LSTM(LSTM_WIDTH, LSTM_WIDTH, LAYERS, batch_first=True)
    x = _hidden(length, LSTM_WIDTH)
    return forward_and_backward(lambda: model(x)[0], model.parameters())


def _mambapy(x: Tensor) -> Run:
    from mambapy.mamba import Mamba as MambapyModel
    from mambapy.mamba import MambaConfig

    model = MambapyModel(MambaConfig(d_model=D_MODEL, n_layers=LAYERS))
    return forward_and_backward(lambda: model(x), model.parameters())


def _transformers(x: Tensor) -> Run:
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(vocab_size=8, hidden_size=D_MODEL, num_hidden_layers=LAYERS)).train()
    model.embeddings.requires_grad_(False)  # the others embed nothing
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("embeddings")]
    return forward_and_backward(lambda: model(inputs_embeds=x, use_cache=False)[0], parameters)


def _floor(rates: Rates, length: int) -> Floor:
    layer = mixer_floor(rates, Mamba(D_MODEL), BATCH, length, backward=True)
    return Floor(LAYERS * layer.ms, f"{LAYERS} layers of {layer.how}")
