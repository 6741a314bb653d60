"""A stack of blocks and a final norm: what every model of the package is built on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.nn.attention import Attention
from mambakit.nn.block import Block
from mambakit.nn.mamba import Mamba
from mambakit.nn.mamba2 import Mamba2
from mambakit.nn.mamba3 import Mamba3
from mambakit.nn.s4d import S4D

MIXERS: Mapping[str, Callable[..., nn.Module]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "s4d": S4D,
    "attention": Attention,
}


class Backbone(nn.Module):
    """`n_layer` blocks of one mixer or of several: `hidden, state = backbone(hidden, state)`.

    What each block adds to the residual starts divided by the square root of the number of such additions, so that
    their sum starts with the variance of one.

    Args:
        d_model: width of the hidden vectors.
        n_layer: blocks.
        mixer: the name of a mixer in `mambakit.nn.MIXERS`, or for a hybrid the names of each block's; or a class of
            one's own that is made and called as those are, and has their `out_proj`.
        mixer_options: arguments of the mixer beside d_model; for a hybrid of several mixers, such arguments by the
            name of the mixer.
        d_intermediate: width of a gated MLP after every mixer; 0 for none.
        norm_eps: added to the mean square in every RMS norm of the blocks.
        dropout: share of what each block adds to the residual that is dropped in training.
        device, dtype: of the parameters.

    >>> backbone = Backbone(d_model=32, n_layer=2, mixer_options={"d_state": 8})
    >>> hidden, state = backbone(torch.randn(1, 100, 32))
    >>> more, state = backbone(torch.randn(1, 7, 32), state)  # carries on where the first call ended
    >>> options = {"mamba2": {"headdim": 16}, "attention": {"n_heads": 2}}
    >>> hybrid = Backbone(32, 3, ["mamba2", "attention", "mamba2"], options)
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        mixer: str | Sequence[str] | Callable[..., nn.Module] = "mamba",
        mixer_options: Mapping[str, Any] | None = None,
        *,
        d_intermediate: int = 0,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kinds = MIXERS
        if callable(mixer):
            kinds, mixer = {mixer.__name__: mixer}, mixer.__name__
        names = [mixer] * n_layer if isinstance(mixer, str) else list(mixer)
        options = _options_by_name([mixer] if isinstance(mixer, str) else names, mixer_options or {}, kinds)
        if len(names) != n_layer:
            raise ValueError(f"mixer must name one mixer or one for each of {n_layer} layers, got {len(names)} names")
        self.layers = nn.ModuleList(
            Block(
                kinds[name](d_model, **options[name], device=device, dtype=dtype),
                d_model,
                d_intermediate=d_intermediate,
                norm_eps=norm_eps,
                dropout=dropout,
                device=device,
                dtype=dtype,
            )
            for name in names
        )
        self.norm_f = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        additions = n_layer * (2 if d_intermediate else 1)
        with torch.no_grad():
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(additions)  # type: ignore[union-attr, operator]
                if layer.mlp is not None:
                    layer.mlp.fc2.weight /= math.sqrt(additions)  # type: ignore[union-attr, operator]

    def forward(
        self, hidden: Tensor, state: tuple[Any, ...] | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """hidden (batch, length, d_model) in and out; the state is a tuple with one entry a layer."""
        hidden, after = self.mix(hidden, state, cu_seqlens=cu_seqlens)
        return self.norm_f(hidden.to(self.norm_f.weight.dtype)), after

    def mix(
        self, hidden: Tensor, state: tuple[Any, ...] | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The blocks without the final norm; hidden is float32 at least after them."""
        before = (None,) * len(self.layers) if state is None else state
        if len(before) != len(self.layers):
            raise ValueError(f"state must have one entry for each of {len(self.layers)} layers, got {len(before)}")
        after = []
        for layer, layer_state in zip(self.layers, before, strict=True):
            hidden, layer_state = layer(hidden, layer_state, cu_seqlens=cu_seqlens)
            after.append(layer_state)
        return hidden, tuple(after)


def _options_by_name(
    names: Sequence[str], options: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The arguments of each mixer: `options` are those of the only one, or such arguments by name."""
    used = set(names)
    for name in names:
        if name not in kinds:
            raise ValueError(f"mixer must be one of {', '.join(kinds)}, got {name!r}")
    if len(used) == 1:
        return {names[0]: options}
    if not set(options) <= used:
        raise ValueError(
            f"mixer_options of several mixers go by the name of the mixer, {' or '.join(sorted(used))}: "
            f"got {', '.join(map(repr, options))}"
        )
    return {name: options.get(name, {}) for name in names}
