"""Loss and gradients of a batch without the host: on a GPU all of it is one CUDA graph, replayed.

A small model's step, and that of a larger one on short sequences, is hundreds of small kernels forwards and backwards;
launched one by one they take several times as long as they run.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mambakit.nn.graph_capture import Replayed
from mambakit.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_MOST_FORMS = 4  # of a batch that are captured: each keeps the memory of its step


def capturable(accelerator: "Accelerator", config: TrainingConfig) -> bool:
    """Whether steps can be captured: one process has a GPU, and takes each batch at once."""
    alone = accelerator.num_processes == 1 and config.gradient_accumulation == 1
    return alone and accelerator.device.type == "cuda"


class _Form(NamedTuple):
    """What a step of one form of batch reads, and what it left: the graph's own, filled anew by each replay."""

    batch: dict[str, Tensor]
    left: dict[str, Any]


class CapturedGradients:
    """The same as `compute`, sooner: `loss, metrics = gradients(batch)`, with the gradients in the parameters.

    >>> gradients = CapturedGradients(compute, model.parameters())  # doctest: +SKIP
    >>> for batch in batches:  # doctest: +SKIP
    ...     loss, metrics = gradients(batch)
    ...     optimizer.step()

    The first batches of a form (names, shapes and dtypes) are taken as ever, later ones by a graph. A fifth form, a
    batch that holds something else than tensors, and a form that `refused` gives a reason for are always taken as ever.

    Args:
        compute: loss and metrics of a batch, whose gradients it has added to those of the parameters; it depends on
            the batch and on what lies on the device, and never waits for that.
        parameters: on one GPU.
    """

    def __init__(
        self,
        compute: Callable[[Any], tuple[Tensor, Mapping[str, Tensor]]],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._compute, self._parameters = compute, list(parameters)
        self._forms: dict[Hashable, _Form] = {}
        with self._on_device():
            self._replayed = Replayed()

    @property
    def refused(self) -> list[str]:
        """Why forms of batches could not be captured."""
        return list(self._replayed.refused.values())

    def __call__(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and metrics of the batch; its gradients are those of the parameters, which had others before."""
        form = _form_of(batch)
        if form is None or form in self._replayed.refused:
            return self._afresh(batch)
        known = self._forms.get(form)
        if known is None:
            if len(self._forms) == _MOST_FORMS:
                return self._afresh(batch)
            known = self._forms[form] = _Form({name: tensor.clone() for name, tensor in batch.items()}, {})
        with self._on_device():
            torch._foreach_copy_(list(known.batch.values()), [batch[name] for name in known.batch])
            self._replayed.call(form, lambda: self._step(known))
        if form in self._replayed.refused:
            del self._forms[form]
        for parameter, gradient in zip(self._parameters, known.left["gradients"], strict=True):
            parameter.grad = gradient
        loss, metrics = known.left["loss"], known.left["metrics"]
        return loss.clone(), {name: value.clone() for name, value in metrics.items()}

    def _on_device(self) -> AbstractContextManager[object]:
        device = self._parameters[0].device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _step(self, form: _Form) -> None:
        form.left.clear()  # of the call before, whose gradients would lie beside those of this one
        loss, metrics = self._afresh(form.batch)
        form.left["loss"] = loss.detach()
        form.left["metrics"] = {name: value.detach() for name, value in metrics.items()}
        form.left["gradients"] = [parameter.grad for parameter in self._parameters]

    def _afresh(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        for parameter in self._parameters:
            parameter.grad = None
        return self._compute(batch)


def _form_of(batch: Any) -> Hashable | None:
    """Names, shapes and dtypes of a batch of tensors; None of another."""
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        return None
    return tuple((name, value.shape, value.dtype) for name, value in batch.items())
