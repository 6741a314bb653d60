"""One Mamba mixer: forward, forward with backward, and a single step, beside its own matrix products and its peers."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.case import Case, Goal, Peer, Run
from benchmarks.floors import Floor, Rates
from benchmarks.passes import forward_and_backward, forward_only
from mambakit.nn import Mamba


def cases(d_model: int = 768, forward_length: int = 2048, backward_length: int = 512) -> list[Case]:
    """A whole sequence forward, a shorter one with all gradients, and one step; the batch is one sequence."""
    return [
        Case(
            "mixer forward",
            f"(1, {forward_length}, {d_model})",
            lambda: _hidden(1, forward_length, d_model),
            lambda x: _forward(Mamba(d_model), x),
            (
                Peer("its matrix products", lambda x: _forward(Products(d_model, x), x), Goal(1 / 1.5)),
                Peer("mambapy", lambda x: _forward(_mambapy(d_model), x)),
                Peer("transformers", lambda x: _forward(_transformers(d_model), x)),
            ),
            lambda rates: mixer_floor(rates, Mamba(d_model), 1, forward_length, backward=False),
        ),
        Case(
            "mixer forward + backward",
            f"(1, {backward_length}, {d_model})",
            lambda: _hidden(1, backward_length, d_model),
            lambda x: _backward(Mamba(d_model), x),
            (
                Peer("its matrix products", lambda x: _backward(Products(d_model, x), x)),
                Peer("mambapy", lambda x: _backward(_mambapy(d_model), x), Goal(10)),
                Peer("transformers", lambda x: _backward(_transformers(d_model), x), once=True),
            ),
            lambda rates: mixer_floor(rates, Mamba(d_model), 1, backward_length, backward=True),
        ),
        Case(
            "mixer step",
            f"(1, {d_model})",
            lambda: _hidden(1, d_model),
            lambda x: _step_of_ours(Mamba(d_model), x),
            (
                Peer("its matrix products", lambda x: _forward(Products(d_model, x), x)),
                Peer("mambapy", lambda x: _step_of_mambapy(_mambapy(d_model), x)),
            ),
        ),
    ]


class Products(nn.Module):
    """The matrix products of a mixer and nothing between them: each on an operand of its own, contiguous.

    Args:
        d_model: of the mixer.
        x: its input (..., d_model), which says how many rows the operands have.
    """

    def __init__(self, d_model: int, x: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear_layers(Mamba(d_model)))
        self.operands = nn.ParameterList(
            torch.randn(*x.shape[:-1], layer.in_features) for layer in linear_layers(Mamba(d_model))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four products; in_proj's is that of x."""
        operands = [x, *list(self.operands)[1:]]
        return tuple(layer(operand) for layer, operand in zip(self.layers, operands, strict=True))


def linear_layers(mixer: Mamba) -> list[nn.Linear]:
    """The matrix products of a mixer, in_proj first."""
    return [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj]


def mixer_floor(rates: Rates, mixer: Mamba, batch: int, length: int, *, backward: bool) -> Floor:
    """Products and scan, one after the other: both need the same units. The backward doubles the products."""
    multiply_adds = batch * length * sum(layer.weight.numel() for layer in linear_layers(mixer))
    return floors.in_sequence(
        floors.products(rates, multiply_adds * (3 if backward else 1)),
        floors.scan(rates, batch, length, mixer.d_inner, mixer.d_state, gated=True, backward=backward),
    )


def _hidden(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape)


def _forward(mixer: nn.Module, x: Tensor) -> Run:
    return forward_only(lambda: mixer(x))


def _backward(mixer: nn.Module, x: Tensor) -> Run:
    def forward() -> Tensor | tuple[Tensor, ...]:
        result = mixer(x)
        return result[0] if isinstance(mixer, Mamba) else result

    return forward_and_backward(forward, [x, *mixer.parameters()])


def _mambapy(d_model: int) -> Any:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=d_model, n_layers=1))


def _transformers(d_model: int) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=d_model, num_hidden_layers=1), layer_idx=0)


def _step_of_ours(mixer: Mamba, x: Tensor) -> Run:
    with torch.no_grad():
        _, state = mixer.step(x)
    return forward_only(lambda: mixer.step(x, state))


def _step_of_mambapy(mixer: Any, x: Tensor) -> Run:
    config = mixer.config
    cache = (
        torch.zeros(x.shape[0], config.d_inner, config.d_state),
        torch.zeros(x.shape[0], config.d_inner, config.d_conv - 1),
    )
    return forward_only(lambda: mixer.step(x, cache))
