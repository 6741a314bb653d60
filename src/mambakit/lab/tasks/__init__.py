"""Synthetic tasks, each a frozen dataclass that draws batches on a device from a seed."""

from mambakit.lab.tasks.batch import IGNORED, Accuracy, Batch, Task, accuracy
from mambakit.lab.tasks.composite import CompositeFunctions
from mambakit.lab.tasks.composite_dataset import CompositeFunctionDataset
from mambakit.lab.tasks.induction import InductionHeads
from mambakit.lab.tasks.inverse import InverseMatching
from mambakit.lab.tasks.recall import AssociativeRecall
from mambakit.lab.tasks.selective_copying import SelectiveCopying
from mambakit.lab.tasks.state_tracking import ModularArithmetic, Parity

TASKS: dict[str, type] = {
    task.name: task
    for task in (
        CompositeFunctions,
        InverseMatching,
        SelectiveCopying,
        InductionHeads,
        AssociativeRecall,
        Parity,
        ModularArithmetic,
    )
}

__all__ = [
    "TASKS",
    "Task",
    "Batch",
    "Accuracy",
    "accuracy",
    "IGNORED",
    "CompositeFunctions",
    "CompositeFunctionDataset",
    "InverseMatching",
    "SelectiveCopying",
    "InductionHeads",
    "AssociativeRecall",
    "Parity",
    "ModularArithmetic",
]
