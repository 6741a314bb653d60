"""Turns an operation on a NamedTuple of inputs into a torch operator with a fake form and a backward.

An operation is a NamedTuple of its inputs, a function that allocates its outputs, and one module for each backend with

    forward(inputs, y, final_state, *kept)          fills its outputs
    backward(inputs, kept, grad_y, grad_final_state, grads)    fills `grads`, the inputs' NamedTuple with a tensor for
                                                    every differentiable input that was given and None elsewhere

where `kept` is what the forward leaves for the backward. A backend that sets ABSENT_GRADIENTS takes None for the
gradient of a final state that nothing depends on; the others get zeros. Where a backward is to follow, one that has
`forward_before_backward` is called by that. `register` makes of these the torch operators `mambakit::<name>` and
`mambakit::<name>_backward`, so that torch.compile and torch.export see the operation whole.
Under torch.vmap one that `mambakit.ops.folding` knows runs once for all models; gradients are taken outside of it.
"""

import contextlib
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambakit.ops.folding import FOLDS, unfolded

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])

_NOT_DIFFERENTIABLE = {"cu_seqlens"}
_AS_IT_IS = contextlib.nullcontext()
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}
_SCALARS = {bool: "bool", int: "SymInt", float: "float", str: "str"}


def register(
    name: str,
    inputs_type: type[Inputs],
    outputs: Callable[[Inputs, bool, str], tuple[Tensor, ...]],
    backends: Mapping[str, Any],
    kept: int = 0,
) -> Callable[[Inputs, str], tuple[Tensor, Tensor]]:
    """Register the operation and return the function `(inputs, backend) -> (y, final_state)` that runs it.

    Args:
        name: of the operator, in the namespace `mambakit`.
        inputs_type: a NamedTuple of tensors and optional tensors, and scalars after them.
        outputs: `(inputs, keep, backend) -> (y, final_state, *kept)`, allocated and not filled; without `keep` the
            kept tensors are empty along their first axis.
        backends: a module with `forward` and `backward` under each name.
        kept: how many tensors are kept.
    """
    make: Callable[..., Inputs] = inputs_type
    hints = get_type_hints(inputs_type)
    count = len(hints)
    tensors = sum(map(_is_tensor, hints.values()))
    assert all(map(_is_tensor, list(hints.values())[:tensors])), f"{inputs_type.__name__} has scalars among its tensors"
    differentiable = [field for field, hint in hints.items() if _is_tensor(hint) and field not in _NOT_DIFFERENTIABLE]
    gradient_places = [place for place, field in enumerate(hints) if field in differentiable]
    arguments = ", ".join(f"{_schema_type(hint)} {field}" for field, hint in hints.items())
    kept_arguments = "".join(f", Tensor kept_{i}" for i in range(kept))

    def results(inputs: Inputs, keep: bool, backend: str) -> tuple[Tensor, ...]:
        filled = outputs(inputs, keep, backend)
        kernels = backends[backend]
        fill = getattr(kernels, "forward_before_backward", kernels.forward) if keep else kernels.forward
        with _as_given(filled[0]):
            fill(inputs, *filled)
        return filled

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return results(make(*args[:count]), args[count], args[count + 1])

    def fake_forward(*args: Any) -> tuple[Tensor, ...]:
        return outputs(make(*args[:count]), args[count], args[count + 1])

    def gradients(inputs: Any) -> Any:
        """The inputs' NamedTuple with an unfilled tensor for every differentiable input that was given."""
        found: list[Tensor | None] = [None] * count
        for place in gradient_places:
            found[place] = _like(inputs[place])
        return make(*found)

    def flat(grads: Any) -> tuple[Tensor, ...]:
        # An operator's results can't be None: an empty tensor stands for the gradient of an absent input.
        found = (grads[place] for place in gradient_places)
        return tuple(torch.empty(0) if grad is None else grad for grad in found)

    def filled_gradients(
        inputs: Any, backend: str, kept_tensors: tuple[Tensor, ...], grad_y: Tensor, grad_final_state: Tensor | None
    ) -> Any:
        grads = gradients(inputs)
        with _as_given(grad_y):
            backends[backend].backward(inputs, kept_tensors, grad_y, grad_final_state, grads)
        return grads

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return flat(filled_gradients(make(*args[:count]), args[count], args[count + 1 : -2], *args[-2:]))

    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        return flat(gradients(make(*args[:count])))

    forward_op = torch.library.custom_op(
        f"mambakit::{name}",
        forward,
        mutates_args=(),
        schema=f"({arguments}, bool keep, str backend) -> ({', '.join(['Tensor'] * (2 + kept))})",
    )
    forward_op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(
        f"mambakit::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"({arguments}, str backend{kept_arguments}, Tensor grad_y, Tensor? grad_final_state) -> "
        f"({', '.join(['Tensor'] * len(differentiable))})",
    )
    backward_op.register_fake(fake_backward)

    def remember(ctx: Any, values: tuple[Any, ...], backend: str, output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*values[:tensors], *output[2:])
        ctx.scalars = values[tensors:]
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # of what is kept, which is large and has no gradient

    def remembered(ctx: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The inputs and what was kept."""
        saved = ctx.saved_tensors
        return make(*saved[:tensors], *ctx.scalars), saved[tensors:]

    def outer_gradients(
        inputs: Inputs, backend: str, grad_y: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As the backend takes them: zeros for the gradient of an output that nothing depends on."""
        may_be_absent = getattr(backends[backend], "ABSENT_GRADIENTS", False)
        if grad_y is None or (grad_final_state is None and not may_be_absent):
            y, final_state, *_ = outputs(inputs, False, backend)
            grad_y = y.zero_() if grad_y is None else grad_y
            grad_final_state = final_state.zero_() if grad_final_state is None else grad_final_state
        return grad_y, grad_final_state

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if not inputs[count]:
            raise RuntimeError(f"mambakit::{name} was called with keep=False on inputs that require a gradient")
        remember(ctx, inputs[:count], inputs[count + 1], output)

    def autograd(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, *_: None) -> tuple[Any, ...]:
        inputs, kept_tensors = remembered(ctx)
        outer = outer_gradients(inputs, ctx.backend, grad_y, grad_final_state)
        found = backward_op(*inputs, ctx.backend, *kept_tensors, *outer)
        grads: list[Tensor | None] = [None] * (count + 2)
        for place, grad in zip(gradient_places, found, strict=True):
            grads[place] = None if inputs[place] is None else grad
        return tuple(grads)

    forward_op.register_autograd(autograd, setup_context=setup_context)
    if inputs_type in FOLDS:
        fold = FOLDS[inputs_type]

        def of_many_models(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            inputs = fold.folded(make(*args[:count]), in_dims[:count], info.batch_size)
            y, final_state, *kept_tensors = forward_op(*inputs, *args[count:])
            axes = y.dim() + fold.y, fold.final_state
            outer = [unfolded(t, axis, info.batch_size) for t, axis in zip((y, final_state), axes, strict=True)]
            # What is kept stays folded: backward alone reads it.
            return (*outer, *kept_tensors), (*axes, *[None] * kept)

        forward_op.register_vmap(of_many_models)

    def recorded_gradients(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Any, ...]:
        inputs, kept_tensors = remembered(ctx)
        outer = outer_gradients(inputs, ctx.backend, grad_y, grad_final_state)
        return (*filled_gradients(inputs, ctx.backend, kept_tensors, *outer), None, None)

    recorded_gradients_once = once_differentiable(recorded_gradients)

    class Recorded(torch.autograd.Function):
        """The operator's gradients without the operator."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            result = forward(*args)
            remember(ctx, args[:count], args[count + 1], result)
            return result[:2]

        @staticmethod
        def backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
            # What refuses a second derivative costs as much as a launch, and is for those who may ask for one.
            found = recorded_gradients_once if torch.is_grad_enabled() else recorded_gradients
            return found(ctx, *outer)

    def run(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
        keep = _needs_gradient(inputs)
        # Outside of graphs and transforms nobody needs the operator itself, which costs 50 microseconds a call, several
        # times that with its backward, and, the first time, a second to load what torch.compile is made of.
        if not nobody_looks_on(inputs):
            result = forward_op(*inputs, keep, backend)
        else:
            result = Recorded.apply(*inputs, keep, backend) if keep else results(inputs, keep, backend)
        return result[0], result[1]

    return run


def runs_plainly(inputs: tuple[Any, ...]) -> bool:
    """Whether a kernel may be called on the inputs as it is: no gradient is asked for, and no graph is made."""
    return not _needs_gradient(inputs) and nobody_looks_on(inputs)


def nobody_looks_on(inputs: tuple[Any, ...]) -> bool:
    """Whether this is plain eager execution: no compilation, no function transform, no tensor but torch's own."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and _PLAIN.issuperset(map(type, inputs))
    )


def _needs_gradient(inputs: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    # Seen through the axis of a vmap nothing requires a gradient; what lies under it may.
    under_vmap = torch._C._are_functorch_transforms_active()
    return under_vmap or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def _as_given(tensor: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which would take a backend's float32 sums in half precision."""
    device = "cuda" if tensor.is_cuda else tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def _is_tensor(hint: Any) -> bool:
    return hint is Tensor or (get_origin(hint) in (Union, types.UnionType) and Tensor in get_args(hint))


def _schema_type(hint: Any) -> str:
    if hint is Tensor:
        return "Tensor"
    return "Tensor?" if _is_tensor(hint) else _SCALARS[hint]


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
