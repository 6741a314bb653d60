"""Weight-only quantisation for inference: the big matrices in 16, 8 or 4 bits, all arithmetic in float32.

    model = quantise(MambaForCausalLM.from_pretrained(folder), "int8")
    model = MambaForCausalLM.from_pretrained(folder, weights="int8")       # the same

A token at a time, a model is as fast as its weights are read from memory, so that a quarter of the bytes is nearly four
times the tokens. What is quantised: the embedding, the head, and the projections in PROJECTIONS of every layer. What
stays in float32: convolutions, norms, A, D, dt_bias and dt_proj, which are small and of which the decays are made.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from mambakit.errors import DataError
from mambakit.nn.linear import Linear
from mambakit.nn.quantised import QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantised_linear import FORMATS, quantise_matrix

if TYPE_CHECKING:
    from mambakit.lm.model import MambaForCausalLM, MambaModel

WEIGHTS = ("float32", *FORMATS)
PROJECTIONS = ("in_proj", "x_proj", "out_proj", "fc1", "fc2")

Model = TypeVar("Model", "MambaForCausalLM", "MambaModel")


@torch.no_grad()
def quantise(model: Model, weights: str) -> Model:
    """Store a model's weights in fewer bits, in place; it is in eval mode from then on, and can't be trained.

    Args:
        model: one whose adapters, if it had any, are merged.
        weights: "bfloat16"; "int8", with a scale for each row of a matrix; "int4", with one for each 32 columns; or
            "float32", which is the model in float32.

    Returns the model. Raises DataError for another name, a model that is quantised already, a layer that is not a plain
    linear one, and in int4 a matrix whose columns are not a multiple of 32.
    """
    if weights not in WEIGHTS:
        raise DataError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if model.quantised is not None:
        raise DataError(f"the model's weights are in {model.quantised} already: read it again to have others")
    if weights != "float32":
        _check(model, weights)
        _replace(model, weights)
        model.quantised = model.get_base().quantised = weights
        model.requires_grad_(False)
    model.float().eval()
    for parameter in model.parameters():
        # What is left would keep all of the file in memory that it is a view of.
        if parameter.untyped_storage().nbytes() > 2 * parameter.nbytes:
            parameter.data = parameter.data.clone()
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and quantised matrices, each counted once: what a step reads from memory."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """What is to be quantised: the whole name, the parent, the name in it, and the module."""
    for prefix, parent in list(model.named_modules()):
        for name, module in list(parent.named_children()):
            if name in ("embeddings", "lm_head", *PROJECTIONS):
                yield f"{prefix}.{name}".lstrip("."), parent, name, module


def _check(model: nn.Module, weights: str) -> None:
    for name, _, _, module in _named(model):
        if type(module) not in (Linear, nn.Linear, nn.Embedding):
            raise DataError(f"{name} is no plain layer and can't be quantised: merge adapters first")
        columns = module.weight.shape[1]  # type: ignore[index]
        if weights == "int4" and columns % 32 != 0:
            raise DataError(f"int4 needs a multiple of 32 columns, but {name} has {columns}: choose int8 or bfloat16")


def _replace(model: "MambaForCausalLM | MambaModel", weights: str) -> None:
    """Put quantised modules in place of plain ones, each freed before the next is made; a tied head stays tied."""
    head: Any = getattr(model, "lm_head", None)
    embedding: Any = model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    del embedding
    for _, parent, name, module in _named(model):
        if not (tied and module is head):
            setattr(parent, name, _quantised(module, weights))
    if tied:
        model.lm_head = QuantisedLinear(model.get_input_embeddings().matrix)  # type: ignore[arg-type]


def _quantised(module: Any, weights: str) -> nn.Module:
    matrix = quantise_matrix(module.weight.detach(), weights)
    if isinstance(module, nn.Embedding):
        return QuantisedEmbedding(matrix)
    return QuantisedLinear(matrix, None if module.bias is None else module.bias.detach().float().clone())
