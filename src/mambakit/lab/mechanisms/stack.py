"""Finding a model's stack of blocks, its final norm and its head: Backbones, and whatever holds one."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.nn import Block


@dataclass(frozen=True)
class Stack:
    """The blocks of a model and the norm after them."""

    layers: list[Any]
    norm_f: nn.Module


def stack_of(model: nn.Module) -> Stack:
    """The one stack of `nn.Block` layers in `model`, wherever it lies.

    Raises DataError where there is none, or more than one.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and isinstance(getattr(module, "norm_f", None), nn.Module)
        and len(module.layers) > 0  # type: ignore[arg-type]
        and all(isinstance(layer, Block) for layer in module.layers)  # type: ignore[union-attr]
    ]
    if len(found) != 1:
        raise DataError(
            f"{type(model).__name__} has {len(found)} stacks of nn.Block layers, expected one: "
            "pass the nn.Backbone to look into"
        )
    return Stack(list(found[0].layers), found[0].norm_f)  # type: ignore[arg-type]


def head_of(model: nn.Module, head: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
    """The weight (outputs, d_model) and bias of what makes logits of hidden vectors.

    Args:
        model: a module with `get_output_embeddings()`, `lm_head` or `head`.
        head: the linear layer itself, for other models.

    Raises DataError where there is none.
    """
    if head is None and callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()  # type: ignore[operator]
    for name in ("lm_head", "head"):
        head = getattr(model, name, None) if head is None else head
    if not isinstance(head, nn.Linear):
        raise DataError(f"{type(model).__name__} has no nn.Linear by the name lm_head or head: pass head=")
    return head.weight, head.bias


def check_rows(inputs: Any, stream: Tensor) -> None:
    """Refuse a run whose rows the model packed into one, as language models do with padded ones.

    Raises DataError where the stream (batch, length, d_model) has not the rows of the inputs (batch, length, ...).
    """
    if isinstance(inputs, Tensor) and stream.shape[:2] != inputs.shape[:2]:
        raise DataError(
            f"the model ran {tuple(inputs.shape[:2])} rows as {tuple(stream.shape[:2])}, without their padding: "
            "pass sequences of one length, without an attention_mask"
        )
