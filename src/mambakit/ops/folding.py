"""Many models in one call: where each operation takes the axis that `torch.vmap` lays over its inputs.

A scan works on channels (or heads) that know nothing of each other, in groups that share B and C. So models of one
shape are more channels and more groups: `models` inputs (batch, length, dim) are one of (batch, length, models * dim),
with A (models * dim, state) and B (batch, length, models * groups, state). A norm has its groups of channels likewise.
The kernel sees one wide call in place of many narrow ones, and every model's result is what it would be alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from mambakit.ops.inputs import ConvInputs, NormInputs, ScanInputs, SsdInputs
from mambakit.ops.mamba3_inputs import RecurrenceInputs, WeightsInputs, WholeScanInputs

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Fold:
    """The axis of every tensor of an operation that grows with the number of models.

    Attributes:
        axes: of the inputs, by name, where negative counted from the end; a tensor that is not here has to be the same
            for all models.
        y, final_state: of the outputs; of y counted from the end.
        per_head: inputs whose axis may have size 1, shared by all heads; of many models it no longer can.
        times: numbers among the inputs that there are for each model, such as groups along the axis.
    """

    axes: Mapping[str, int]
    y: int
    final_state: int
    per_head: Mapping[str, str] = field(default_factory=dict)
    times: tuple[str, ...] = ()

    def folded(self, inputs: Inputs, in_dims: Sequence[int | None], models: int) -> Inputs:
        """`inputs` of `models` models, each tensor's models along the axis of `in_dims`, as those of one call."""
        named = inputs._asdict()  # type: ignore[attr-defined]
        for (name, value), dim in zip(list(named.items()), in_dims, strict=True):
            if not isinstance(value, Tensor):
                continue
            if name not in self.axes:
                if dim is not None:
                    raise ValueError(f"{name} must be the same for all models of a vmap: map over it with in_dims=None")
                continue
            axis = self.axes[name] % (value.dim() - (dim is not None))
            value = (
                value.unsqueeze(axis).expand(*value.shape[:axis], models, *value.shape[axis:])
                if dim is None
                else (value.movedim(dim, axis))
            )
            if name in self.per_head:
                value = value.expand(
                    *value.shape[: axis + 1], self._heads(inputs, in_dims, name), *value.shape[axis + 2 :]
                )
            named[name] = value.flatten(axis, axis + 1)
        named |= {name: models * named[name] for name in self.times}
        return inputs._replace(**named)  # type: ignore[attr-defined]

    def _heads(self, inputs: Any, in_dims: Sequence[int | None], name: str) -> int:
        other = self.per_head[name]
        place = inputs._fields.index(other)
        shape = list(inputs[place].shape)
        if in_dims[place] is not None:
            del shape[in_dims[place]]
        return int(shape[self.axes[other]])


def unfolded(tensor: Tensor, axis: int, models: int) -> Tensor:
    """`tensor` with its axis `axis` >= 0 in two: the models, and what each has."""
    return tensor.unflatten(axis, (models, tensor.shape[axis] // models))


FOLDS: Mapping[type, Fold] = {
    ScanInputs: Fold(
        {"u": 2, "delta": 2, "A": 0, "B": 2, "C": 2, "D": 0, "z": 2, "delta_bias": 0, "initial_state": 1},
        y=-1,
        final_state=1,
    ),
    ConvInputs: Fold({"x": 2, "weight": 0, "bias": 0, "initial_state": 2}, y=-1, final_state=2),
    SsdInputs: Fold(
        {"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0, "z": 2, "dt_bias": 0, "initial_state": 1},
        y=-2,
        final_state=1,
    ),
    NormInputs: Fold({"x": -1, "weight": 0, "z": -1}, y=-1, final_state=0, times=("groups",)),
    RecurrenceInputs: Fold(
        {"v": 3, "k": 3, "q": 3, "log_decay": 2, "scale": 2, "gamma": 2, "initial_state": 1}, y=-2, final_state=1
    ),
    WeightsInputs: Fold({"dt": 2, "dt_bias": 0, "A": 2, "trap": 2, "angles": 2}, y=-1, final_state=2),
    WholeScanInputs: Fold(
        {
            "x": 2,
            "B": 3,
            "C": 3,
            "z": 2,
            "log_decay": 2,
            "scale": 2,
            "own": 2,
            "speeds": 2,
            "steps": 2,
            "D": 0,
            "up": 0,
            "gate": 0,
            "down": 0,
            "B_bias": 0,
            "C_bias": 0,
            "initial_angle": 1,
            "initial_state": 1,
        },
        y=-2,
        final_state=1,
        per_head={"speeds": "x"},
    ),
}
