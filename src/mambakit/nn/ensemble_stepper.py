"""One token at a time through several models of the same input at once, and the mean of what they say.

    y_t = mean_k head_k(stack_k(embed_k(x_t)))

Embeddings, stacks and heads of all models run in a single call of the compiled extension, whose time is that of
reading their weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn import native_stack
from mambakit.nn.backbone import Backbone
from mambakit.ops.cpu import native


class EnsembleStepper:
    """Steps models and carries their states: `y = stepper(x)`, x (inputs,) and y (outputs,) in NumPy's float32.

    The weights are read where they are, and must stay there: make another stepper after moving, converting or replacing
    parameters. A stepper serves one thread at a time.

    Args:
        models: (embed, stack, head) of each: a Linear from inputs to width, a recurrent layer called as
            `y, state = stack(x, state)` on (batch, length, width), and a Linear from width to outputs.

    Attributes:
        backend: "cpu" where the compiled extension takes the steps; "layers" where the layers do, which is slower.
        reason: why the layers do; empty for "cpu".

    Raises ValueError where there is no model, or where they differ in inputs or outputs.

    >>> models = [(nn.Linear(3, 16), Backbone(16, 2), nn.Linear(16, 1)) for _ in range(2)]
    >>> stepper = EnsembleStepper(models)
    >>> y = stepper(np.zeros(3, dtype=np.float32))
    """

    def __init__(self, models: Sequence[tuple[nn.Linear, nn.Module, nn.Linear]]) -> None:
        if not models:
            raise ValueError("models must hold at least one (embed, stack, head)")
        sizes = {(embed.in_features, head.out_features) for embed, _, head in models}
        if len(sizes) > 1:
            raise ValueError(f"models must agree in inputs and outputs, got {sorted(sizes)}")
        self.inputs, self.outputs = sizes.pop()
        self.reason = next((reason for model in models if (reason := _refusal(*model))), "")
        self.backend = "layers" if self.reason else "cpu"
        self._steps: _LayerSteps | _CompiledSteps = _LayerSteps(models) if self.reason else _CompiledSteps(models)

    def reset(self) -> None:
        """Start afresh, as before the first step."""
        self._steps.reset()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Take one step; the array that is returned is the caller's own. Raises ValueError for a wrong shape."""
        if x.shape != (self.inputs,):
            raise ValueError(f"x must have shape (inputs,) = ({self.inputs},), got {x.shape}")
        return self._steps.step(x)


class _CompiledSteps:
    """Steps taken by native/bind_stack.cpp's Ensemble."""

    def __init__(self, models: Sequence[tuple[nn.Linear, nn.Module, nn.Linear]]) -> None:
        with torch.inference_mode(False):
            source = torch.zeros(1, models[0][0].in_features)
            self._result = torch.zeros(1, models[0][2].out_features)
            stacks, self._states = [], []
            for embed, stack, head in models:
                state = tree_map(lambda part: part.float().contiguous().clone(), _initial_state(embed, stack))
                hidden = torch.zeros(2, 1, embed.out_features)
                compiled = native_stack.build(stack, state, *hidden)
                compiled.set_input(*native_stack.weight_and_bias(embed), source)
                compiled.set_output(*native_stack.weight_and_bias(head), torch.zeros_like(self._result))
                stacks.append(compiled)
                self._states += tree_leaves(state)
            self._initial = [part.clone() for part in self._states]
        self._ensemble = native.Ensemble(stacks, self._result)
        self._source, self._target = source.numpy()[0], self._result.numpy()[0]

    def reset(self) -> None:
        for part, initial in zip(self._states, self._initial, strict=True):
            part.copy_(initial)

    def step(self, x: np.ndarray) -> np.ndarray:
        self._source[:] = x
        self._ensemble.step(torch.get_num_threads())
        return self._target.copy()


class _LayerSteps:
    """Steps taken by the layers themselves."""

    def __init__(self, models: Sequence[tuple[nn.Linear, nn.Module, nn.Linear]]) -> None:
        self._models = models
        self.reset()

    def reset(self) -> None:
        self._states: list[Any] = [None] * len(self._models)

    @torch.no_grad()
    def step(self, x: np.ndarray) -> np.ndarray:
        total = torch.zeros(())
        for number, (embed, stack, head) in enumerate(self._models):
            weight = embed.weight
            hidden = embed(torch.from_numpy(x).to(weight.device, weight.dtype)[None, None])
            hidden, self._states[number] = stack(hidden, self._states[number])
            total = total + head(hidden.to(head.weight.dtype))[0, 0].float().cpu()
        return (total / len(self._models)).numpy()


def _refusal(embed: nn.Linear, stack: nn.Module, head: nn.Linear) -> str:
    if not isinstance(stack, Backbone):
        return f"{type(stack).__name__} is not a Backbone"
    reasons = (native_stack.refusal(stack), *(native_stack.refusal(linear) for linear in (embed, head)))
    return next((reason for reason in reasons if reason), "")


def _initial_state(embed: nn.Linear, stack: nn.Module) -> Any:
    """The state of an empty sequence."""
    with torch.no_grad():
        return stack(torch.empty(1, 0, embed.out_features))[1]
