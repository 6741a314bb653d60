"""A sequence layer as an ONNX file, which onnxruntime and others run without Python, torch or mambakit.

    step form       y_t, state_t = layer(x_t, state_{t-1})      x_t and y_t (batch, d_model)
    sequence form   y, state = layer(x[, state])                x and y (batch, length, d_model)

The tensors of the state are inputs `state....` and outputs `next_state....`, named by their place in the layer's own
state: `state.ssm` of a mixer, `state.0.ssm` of a Backbone's first layer. Batch and length are free, and a recurrence
runs over time as ONNX's Scan, so that one file serves every length.
"""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import (
    GetAttrKey,
    KeyPath,
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_structure,
    tree_unflatten,
)

from mambakit.export.plain_operators import PLAIN
from mambakit.export.real_s4d import RealS4D
from mambakit.nn import S4D, Attention, Backbone, Bidirectional, Block, Mamba, Mamba2, Mamba3
from mambakit.ops import dispatch
from mambakit.training.artefacts import write_file

_NEEDED = ("onnx", "onnxscript")
_LARGEST = 2**31  # bytes of a protocol buffer, which an ONNX file is
_BATCH, _LENGTH, _PAST = 2, 5, 7  # of the traced example: not 0 or 1, which tracing takes for fixed, and no two equal


def onnx(model: nn.Module, path: str | Path, *, step: bool = False, initial_state: bool = False) -> None:
    """Write `model` to `path` as ONNX, whole or not at all, replacing what was there.

    The inputs are `x` and, in the step form or with `initial_state`, the state; the outputs are `y` and the state after
    the last step, all float32 but for an attention's positions. A state of zeros starts afresh; an attention's has an
    axis `past`, of size 0 at the start, which grows with every call.

    Args:
        model: a Backbone, a Block or a mixer with float32 parameters; it is exported in evaluation mode, as a copy.
        path: of the file.
        step: write the step form and not the sequence form.
        initial_state: whether the sequence form takes a state to carry on from; without it every call starts afresh.

    Raises:
        ImportError: the packages of the extra `mambakit[onnx]` are missing.
        TypeError: a model of another kind, or a parameter that is not float32.
        ValueError: more weights than an ONNX file can hold, a state asked for of a model that has none, or
            MAMBAKIT_BACKEND=reference, whose loops have a fixed length.
        ArtefactError: the file cannot be written.

    >>> onnx(Backbone(d_model=32, n_layer=2), "backbone.onnx", step=True)  # doctest: +SKIP
    """
    _check(model)
    with torch.no_grad():
        program, free, inputs, outputs = _traced(copy.deepcopy(model).cpu().eval(), step, initial_state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name: ")  # of an axis that is an earlier one's namesake
            written = torch.onnx.export(
                program, dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=free, verbose=False
            )
    assert written is not None  # None is for a call with a file
    write_file(path, written.model_proto.SerializeToString())


class _Flat(nn.Module):
    """A layer whose state is a list of tensors, and which in the step form takes one step."""

    def __init__(self, layer: nn.Module, structure: Any, step: bool) -> None:
        super().__init__()
        self.layer, self.structure, self.step = layer, structure, step

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        before = tree_unflatten(state, self.structure) if state else None
        y, after = self.layer(x[:, None] if self.step else x, before)
        return y[:, 0] if self.step else y, *(part for part in tree_leaves(after) if part is not None)


def _traced(layer: nn.Module, step: bool, initial_state: bool) -> tuple[ExportedProgram, Any, list[str], list[str]]:
    """The program in plain operators, and the names of its free axes, of its inputs and of its outputs."""
    d_model = _width(layer)
    _, empty = layer(torch.zeros(_BATCH, 0, d_model))
    _, state = layer(torch.zeros(_BATCH, _PAST, d_model))
    found = [(path, part) for path, part in tree_leaves_with_path(state) if part is not None]
    names = [_spelled(path) for path, _ in found]
    carried = step or initial_state
    if carried and not found:
        raise ValueError("model has no state to carry on from: export its sequence form, without initial_state")

    x = torch.zeros(_BATCH, d_model) if step else torch.zeros(_BATCH, _LENGTH, d_model)
    free = {0: "batch"} if step else {0: "batch", 1: "length"}
    before = [part for _, part in found] if carried else []
    free_in_state = [
        {0: "batch"} | {axis: "past" for axis, size in enumerate(part.shape) if size != start.shape[axis]}
        for part, start in zip(before, tree_leaves(empty) if carried else [], strict=True)
    ]
    dims = {name: Dim(name) for name in ("batch", "length", "past")}
    program = torch.export.export(
        _Flat(_in_real_numbers(layer), tree_structure(state), step),
        (x, before),
        dynamic_shapes=tree_map(dims.get, (free, free_in_state)),
    )
    state_names = [f"state{name}" for name in names]
    return (
        program.run_decompositions(dict(PLAIN)),
        (free, *free_in_state),
        ["x", *(state_names if carried else [])],
        ["y", *(f"next_{name}" for name in state_names)],
    )


def _spelled(path: KeyPath) -> str:
    """A place in the state, `.0.ssm`."""
    return "".join(f".{key.name if isinstance(key, GetAttrKey) else key.idx}" for key in path)  # type: ignore[attr-defined]


def _in_real_numbers(layer: nn.Module) -> nn.Module:
    """`layer`, every S4D in it replaced."""
    if isinstance(layer, S4D):
        return RealS4D(layer)
    for name, child in layer.named_children():
        setattr(layer, name, _in_real_numbers(child))
    return layer


def _width(layer: Any) -> int:
    if isinstance(layer, Backbone):
        return layer.norm_f.weight.shape[0]
    if isinstance(layer, Block):
        return layer.norm.weight.shape[0]
    if isinstance(layer, Bidirectional):
        return _width(layer.forward_layer)
    return layer.d_model if isinstance(layer, S4D) else layer.in_proj.in_features


def _check(model: nn.Module) -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX files need {' and '.join(missing)}: pip install 'mambakit[onnx]'")
    kinds = (Backbone, Block, Mamba, Mamba2, Mamba3, S4D, Attention, Bidirectional)
    if not isinstance(model, kinds):
        raise TypeError(f"model must be a Backbone, a Block or a mixer of mambakit.nn, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {parameter.dtype}: export model.float()")
    if sum(parameter.nbytes for parameter in model.parameters()) >= _LARGEST:
        raise ValueError(f"model must have less than {_LARGEST} bytes of weights: an ONNX file holds no more")
    if dispatch.choose(torch.device("cpu")) == "reference":
        raise ValueError("MAMBAKIT_BACKEND=reference can't be exported, its loops have a fixed length: unset it")
