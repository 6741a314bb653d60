"""One token at a time through a stack of layers, in one call: what streaming prediction and decoding run on.

    y_t, state_t = layer(x_t, state_{t-1})

The layers take a step too, and spend most of it in Python. Here every norm, product, convolution and scan of the whole
stack runs in a single call of the compiled extension, whose time is that of reading the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map, tree_structure

from mambakit.nn import native_stack
from mambakit.nn.backbone import Backbone
from mambakit.nn.block import Block
from mambakit.nn.mamba import Mamba
from mambakit.nn.mamba2 import Mamba2
from mambakit.nn.mamba3 import Mamba3


class Stepper:
    """Steps a layer and carries its state: `y = stepper(x)`, x and y (batch_size, d_model).

    The state has the layer's own form, so that a sequence may be read at once and carried on step by step, or the other
    way round. Steps compute in float32, whatever the dtype of the weights, and record no gradients.

    Weights are read where they are: an optimizer's step, `load_state_dict` and edits in place take effect at the next
    call, and so does moving parameters, changing their dtype or putting others in their place. Settings that are not
    parameters (`dt_limit`, an `eps`, hooks, another submodule) are read when the stepper is made. A stepper serves one
    thread at a time; `fork` makes another.

    Args:
        layer: a Backbone, a Block, or a mixer of the kinds Mamba, Mamba2, Mamba3.
        batch_size: sequences that advance together.
        embedding: a module that makes vectors (batch_size, d_model) of tokens (batch_size,); x are then tokens.
        head: a linear layer that y goes through.

    Attributes:
        backend: "cpu" where the compiled stack takes the steps; "layers" where the layers do, which is slower and gives
            the same results: without the extension, on another device, in float64, or for mixers and modules that it
            does not know.
        reason: why the layers do; empty for "cpu".

    >>> backbone = Backbone(d_model=32, n_layer=2)
    >>> stepper = Stepper(backbone)
    >>> hidden, state = backbone(torch.randn(1, 100, 32))
    >>> stepper.load(state)
    >>> y = stepper(torch.randn(1, 32))  # the step after those hundred
    """

    def __init__(
        self,
        layer: nn.Module,
        batch_size: int = 1,
        *,
        embedding: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        if not isinstance(layer, Backbone | Block | Mamba | Mamba2 | Mamba3):
            raise TypeError(f"layer must be a Backbone, a Block, a Mamba, Mamba2 or Mamba3, got {type(layer).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.layer, self.batch_size, self.embedding, self.head = layer, batch_size, embedding, head
        self._d_model: int = _width(layer)
        self._parts = [part for part in (layer, embedding, head) if part is not None]
        self._parameters = [
            (tensors, name)
            for part in self._parts
            for module in part.modules()
            for tensors in (module._parameters, module._buffers)
            for name, parameter in tensors.items()
            if parameter is not None
        ]
        self._bind(self._initial_state())

    @property
    def state(self) -> Any:
        """What the layer would have returned as its state; a copy, which later steps leave as it is."""
        return self._steps.state

    def load(self, state: Any) -> None:
        """Carry on from `state`: one that the layer returned, or another stepper's.

        Raises ValueError for the state of another kind of layer, or of another size or batch size.
        """
        self._check(state)
        self._steps.load(state)

    def reset(self) -> None:
        """Start afresh, as before the first step."""
        self._steps.load(self._initial_state())

    def fork(self) -> "Stepper":
        """Another stepper of the same layer, which carries on from the same state on its own."""
        other = Stepper(self.layer, self.batch_size, embedding=self.embedding, head=self.head)
        other._steps.load(self.state)
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """Take one step: x (batch_size, d_model) of any floating dtype; y is float32 (float64 in a float64 model).

        With an embedding x are tokens (batch_size,) instead, and with a head y is what it says.

        Raises ValueError for a wrong shape, and where a gradient of x would be lost; IndexError for tokens that the
        embedding does not have.
        """
        if self.embedding is not None:
            if x.shape != (self.batch_size,) or x.is_floating_point():
                raise ValueError(f"x must be {self.batch_size} tokens, got {x.dtype} of shape {tuple(x.shape)}")
        elif x.shape != (self.batch_size, self._d_model):
            expected = (self.batch_size, self._d_model)
            raise ValueError(f"x must have shape (batch_size, d_model) = {expected}, got {tuple(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x requires a gradient, which steps do not record: call the layer itself, or detach x")
        if self._addresses() != self._bound_to:
            self._check(self._steps.state)  # other parameters may have other sizes
            self._bind(self._steps.state)
        return self._steps.step(x)

    def _bind(self, state: Any) -> None:
        """Choose who takes the steps, by the parameters as they are now."""
        self.reason = next((reason for part in self._parts if (reason := native_stack.refusal(part))), "")
        self.backend = "layers" if self.reason else "cpu"
        self._steps: _LayerSteps | native_stack.CompiledSteps = (
            _LayerSteps(self.layer, state, self.embedding, self.head)
            if self.reason
            else native_stack.CompiledSteps(self.layer, self._d_model, state, self.embedding, self.head)
        )
        self._bound_to = self._addresses()

    def _addresses(self) -> list[int]:
        # Of parameters that were moved, converted or replaced. What the stack still holds of the old ones is not freed,
        # and so their addresses can't come back as those of others.
        return [parameters[name].data_ptr() for parameters, name in self._parameters]  # type: ignore[union-attr]

    def _initial_state(self) -> Any:
        """The state of an empty sequence."""
        with torch.no_grad():
            parameter = next(self.layer.parameters())
            empty = torch.empty(self.batch_size, 0, self._d_model, device=parameter.device)
            _, state = self.layer(_as_input(self.layer, empty))
        if any(part is None for part in tree_leaves(state)):
            raise ValueError("layer has no state to carry on from, and so can't be stepped")
        return state

    def _check(self, state: Any) -> None:
        """Raise ValueError unless `state` has the form of the layer's own, and its sizes."""
        expected = self._initial_state()
        if tree_structure(state) != tree_structure(expected):
            raise ValueError(f"state must have the form {tree_structure(expected)}, got {tree_structure(state)}")
        for (path, wanted), got in zip(tree_leaves_with_path(expected), tree_leaves(state), strict=True):
            # An axis that is empty in the state of an empty sequence grows with the past, as an attention's does.
            sizes = tuple(size if first else 0 for size, first in zip(got.shape, wanted.shape, strict=False))
            if got.dim() != wanted.dim() or sizes != tuple(wanted.shape):
                raise ValueError(f"state{keystr(path)} must have shape {tuple(wanted.shape)}, got {tuple(got.shape)}")


class _LayerSteps:
    """Steps taken by the layer itself."""

    def __init__(self, layer: nn.Module, state: Any, embedding: nn.Module | None, head: nn.Module | None) -> None:
        self._layer, self._embedding, self._head = layer, embedding, head
        self.load(state)

    def load(self, state: Any) -> None:
        device = next(self._layer.parameters()).device
        self.state = tree_map(lambda part: part.detach().to(device), state)

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self._embedding is not None:
                x = self._embedding(x)
            y, self.state = self._layer(_as_input(self._layer, x)[:, None], self.state)
            y = y[:, 0]
            if self._head is not None:
                y = self._head(y.to(getattr(self._head, "weight", y).dtype))
        return y.to(torch.promote_types(y.dtype, torch.float32))


def _width(layer: Any) -> int:
    if isinstance(layer, Backbone):
        return layer.norm_f.weight.shape[0]
    return layer.norm.weight.shape[0] if isinstance(layer, Block) else layer.d_model


def _as_input(layer: Any, x: Tensor) -> Tensor:
    """`x` in the dtype that the layer expects; blocks convert theirs, so that their residual stays wide."""
    return x if isinstance(layer, Backbone | Block) else x.to(getattr(layer.in_proj, "weight", x).dtype)
