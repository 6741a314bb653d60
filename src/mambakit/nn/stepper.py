"""One token at a time through a stack of layers, in one call: what streaming prediction and decoding run on.

    y_t, state_t = layer(x_t, state_{t-1})

The layers take a step too, and spend most of it in Python. Here every norm, product, convolution and scan of the whole
stack runs in a single call of the compiled extension, whose time is that of reading the weights. On a GPU the layers'
step is captured as a CUDA graph and replayed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map, tree_structure

from mambakit.nn import native_stack
from mambakit.nn.backbone import Backbone
from mambakit.nn.block import Block
from mambakit.nn.graphed_steps import GraphedSteps
from mambakit.nn.joints import has_hooks
from mambakit.nn.mamba import Mamba
from mambakit.nn.mamba2 import Mamba2
from mambakit.nn.mamba3 import Mamba3
from mambakit.nn.step_products import goes_by_step
from mambakit.ops import decode


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
        backend: "cpu" where the compiled stack takes the steps; "graph" where a CUDA graph does, captured at the first;
            "layers" where the layers do, which is slower and gives the same results: without the extension, on other
            devices, in float64, for mixers and modules that the stack does not know, or a step that can't be captured.
        reason: why the layers do; empty for "cpu" and "graph".

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
        self._empty = self._initial_state()
        self._bind(self._empty)

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
        self._steps.load(self._empty)

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
        self._follow_parameters()
        if self.backend == "graph" and isinstance(self._steps, _LayerSteps):
            self._capture(x)
        return self._steps.step(x)

    def read(self, x: Tensor) -> Tensor | None:
        """Take the steps of a short sequence at once, where that is what costs least.

        x is (batch_size, length, d_model), or tokens (batch_size, length). Returns the last y, as the last of single
        steps would have given it. Returns None, and leaves the state as it was, where the layer had better read x: on
        a CPU, for long sequences, and for lengths that have not come up before.

        Raises ValueError for a wrong shape.
        """
        inner = () if self.embedding is not None else (self._d_model,)
        if x.dim() != 2 + len(inner) or x.shape[0] != self.batch_size or x.shape[2:] != inner:
            expected = ", ".join(map(str, (self.batch_size, "length", *inner)))
            raise ValueError(f"x must have shape ({expected}), got {tuple(x.shape)}")
        self._follow_parameters()
        return self._steps.read(self._given(x)) if isinstance(self._steps, GraphedSteps) else None

    def _given(self, x: Tensor) -> Tensor:
        """x on the device of the parameters, and vectors in the dtype that the layer takes."""
        x = x.to(next(self.layer.parameters()).device)
        if self.embedding is None:
            x = _as_input(self.layer, x.to(torch.promote_types(x.dtype, torch.float32)))
        return x

    def _follow_parameters(self) -> None:
        """Take over parameters that were moved, converted or replaced."""
        if self._addresses() != self._bound_to:
            self._empty = self._initial_state()  # other parameters may have other sizes
            self._check(self._steps.state)
            self._bind(self._steps.state)

    def _bind(self, state: Any) -> None:
        """Choose who takes the steps, by the parameters as they are now."""
        self.reason = next((reason for part in self._parts if (reason := native_stack.refusal(part))), "")
        self.backend = "layers" if self.reason else "cpu"
        self._steps: _LayerSteps | GraphedSteps | native_stack.CompiledSteps = (
            _LayerSteps(self._whole, self.layer, state)
            if self.reason
            else native_stack.CompiledSteps(self.layer, self._d_model, state, self.embedding, self.head)
        )
        if next(self.layer.parameters()).is_cuda:
            self.backend, self.reason = "graph", ""
        self._bound_to = self._addresses()

    def _whole(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Embedding, layer and head, called as a layer is; the last y alone."""
        if self.embedding is not None:
            x = self.embedding(x)
        if self._norm_goes_with_head(x, state):
            return self._by_norm_and_head(x, state)
        y, state = self.layer(_as_input(self.layer, x), state)
        y = y[:, -1:]
        return (y if self.head is None else self.head(y.to(getattr(self.head, "weight", y).dtype))), state

    def _norm_goes_with_head(self, x: Tensor, state: Any) -> bool:
        """Whether the last norm and the head are one launch of a step on a GPU."""
        layer, head = self.layer, self.head
        return (
            isinstance(layer, Backbone)
            and head is not None
            and type(layer) is Backbone
            and type(layer.norm_f) is nn.RMSNorm
            and not has_hooks(layer, layer.norm_f)
            and goes_by_step(head, self.batch_size, after_norm=True)
            and decode.serves(x, tuple(tree_leaves(state)), None, self.layer.parameters())
        )

    def _by_norm_and_head(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        layer: Any = self.layer
        head: Any = self.head
        hidden, state = layer.mix(x, state)
        normed = {"norm": layer.norm_f.weight, "eps": layer.norm_f.eps, "dtype": torch.float32}
        return decode.linear(hidden[:, 0], head.weight, head.bias, **normed)[:, None], state

    def _capture(self, x: Tensor) -> None:
        """Let a graph take the steps from here; or leave them to the layers, and say why."""
        try:
            self._steps = GraphedSteps(self._whole, self._given(x), self._steps.state)
        except RuntimeError as error:
            self.backend, self.reason = "layers", str(error)

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
        expected = self._empty
        if tree_structure(state) != tree_structure(expected):
            raise ValueError(f"state must have the form {tree_structure(expected)}, got {tree_structure(state)}")
        for (path, wanted), got in zip(tree_leaves_with_path(expected), tree_leaves(state), strict=True):
            # An axis that is empty in the state of an empty sequence grows with the past, as an attention's does.
            sizes = tuple(size if first else 0 for size, first in zip(got.shape, wanted.shape, strict=False))
            if got.dim() != wanted.dim() or sizes != tuple(wanted.shape):
                raise ValueError(f"state{keystr(path)} must have shape {tuple(wanted.shape)}, got {tuple(got.shape)}")


class _LayerSteps:
    """Steps taken by the layers themselves."""

    def __init__(self, whole: Callable[..., Any], layer: nn.Module, state: Any) -> None:
        self._whole, self._layer = whole, layer
        self.load(state)

    def load(self, state: Any) -> None:
        device = next(self._layer.parameters()).device
        self.state = tree_map(lambda part: part.detach().to(device), state)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        y, self.state = self._whole(x[:, None], self.state)
        return y[:, 0].to(torch.promote_types(y.dtype, torch.float32))


def _width(layer: Any) -> int:
    if isinstance(layer, Backbone):
        return layer.norm_f.weight.shape[0]
    return layer.norm.weight.shape[0] if isinstance(layer, Block) else layer.d_model


def _as_input(layer: Any, x: Tensor) -> Tensor:
    """`x` in the dtype that the layer expects; blocks convert theirs, so that their residual stays wide."""
    return x if isinstance(layer, Backbone | Block) else x.to(getattr(layer.in_proj, "weight", x).dtype)
