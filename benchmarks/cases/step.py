"""One token at a time: a block of each mixer beside reading its weights, and a small stack beside eager torch."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Goal, Peer, Run
from benchmarks.eager_step import EagerStep
from benchmarks.passes import forward_only
from mambakit.nn import Backbone, Stepper

SMALL_LAYERS, SMALL_WIDTH = 4, 128
_PROMPT = 4  # tokens that fill the peers' caches


def cases(d_model: int = 768, headdim: int = 64) -> list[Case]:
    """A block and its final norm, with mixers of the sizes of the 130M models, and the stack of the streaming goals."""
    heads = {"headdim": headdim}
    return [
        _one_block("mamba", d_model, {}, (Peer("transformers", _transformers_mamba, Goal(5)),)),
        _one_block("mamba2", d_model, heads, (Peer("transformers", _transformers_mamba2, Goal(5)),)),
        _one_block("mamba3", d_model, heads, ()),
        Case(
            "one token, small stack",
            f"{SMALL_LAYERS} layers, (1, {SMALL_WIDTH})",
            lambda: _Stack("mamba", SMALL_WIDTH, SMALL_LAYERS, {}),
            _stepper,
            (
                Peer("eager torch", _eager, Goal(10)),
                Peer("transformers", _transformers_mamba),
                Peer("mambapy", _mambapy),
                Peer("its layers", _layers),
                Peer("reading its weights", _reading),
            ),
        ),
    ]


class _Stack:
    """A backbone and its input."""

    def __init__(self, mixer: str, d_model: int, n_layer: int, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.backbone = Backbone(d_model, n_layer, mixer, options)
        self.x = torch.randn(1, d_model)


def _one_block(mixer: str, d_model: int, options: dict[str, Any], peers: tuple[Peer, ...]) -> Case:
    return Case(
        f"one token, {mixer}",
        f"(1, {d_model})",
        lambda: _Stack(mixer, d_model, 1, options),
        _stepper,
        (*peers, Peer("its layers", _layers), Peer("reading its weights", _reading, Goal(1 / 2))),
    )


def _stepper(stack: _Stack) -> Run:
    stepper = Stepper(stack.backbone)
    return lambda: stepper(stack.x)


def _layers(stack: _Stack) -> Run:
    with torch.no_grad():
        _, state = stack.backbone(stack.x[:, None])
    return forward_only(lambda: stack.backbone(stack.x[:, None], state))


def _eager(stack: _Stack) -> Run:
    step = EagerStep(stack.backbone, batch=1)
    return forward_only(lambda: step(stack.x))


def _reading(stack: _Stack) -> Run:
    """The fastest reading in torch of as many bytes; what is summed lies in one piece."""
    weights = torch.ones(sum(parameter.numel() for parameter in stack.backbone.parameters()))
    return weights.sum


def _transformers_mamba(stack: _Stack) -> Run:
    from transformers import MambaConfig, MambaModel

    d_model, n_layer = stack.x.shape[1], len(stack.backbone.layers)
    return _cached_step(MambaModel(MambaConfig(vocab_size=8, hidden_size=d_model, num_hidden_layers=n_layer)), stack.x)


def _transformers_mamba2(stack: _Stack) -> Run:
    from transformers import Mamba2Config, Mamba2Model

    d_model, mixer = stack.x.shape[1], stack.backbone.layers[0].mixer
    config = Mamba2Config(
        vocab_size=8,
        hidden_size=d_model,
        num_hidden_layers=len(stack.backbone.layers),
        num_heads=mixer.heads,
        head_dim=mixer.headdim,
        state_size=mixer.d_state,
        n_groups=mixer.n_groups,
    )
    return _cached_step(Mamba2Model(config), stack.x)


def _cached_step(model: nn.Module, x: Tensor) -> Run:
    with torch.no_grad():
        cache = model.eval()(inputs_embeds=x[:, None].repeat(1, _PROMPT, 1), use_cache=True).cache_params
    return forward_only(lambda: model(inputs_embeds=x[:, None], use_cache=True, cache_params=cache))


def _mambapy(stack: _Stack) -> Run:
    from mambapy.mamba import Mamba as MambapyModel
    from mambapy.mamba import MambaConfig

    model = MambapyModel(MambaConfig(d_model=stack.x.shape[1], n_layers=len(stack.backbone.layers)))
    config = model.config
    empty = (torch.zeros(1, config.d_inner, config.d_state), torch.zeros(1, config.d_inner, config.d_conv - 1))
    return forward_only(lambda: model.step(stack.x, [empty] * config.n_layers))
