"""The composite task as a torch Dataset of (sequence, label), for a training loop of one's own."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mambakit.errors import DataError
from mambakit.lab.tasks.composite import CompositeFunctions

MODES = {"train": "train", "test": "test", "ood": "composite", "composite": "composite", "symmetric": "symmetric"}


class CompositeFunctionDataset(Dataset[tuple[Tensor, Tensor]]):
    """A split of composite functions, drawn once: `dataset[i]` is tokens (length,) and the label, a scalar; int64.

    Args:
        mode: "train", "test", "composite" or "symmetric", the splits of `CompositeFunctions`; "ood" is "composite".
        num_samples: None for as many as the task has.
        task: its settings; None for the paper's.
        seed: the samples are those of `task.batch` with a generator of this seed.
        device: where they are drawn and stay.

    Raises DataError for another mode.

    >>> dataset = CompositeFunctionDataset(mode="test", num_samples=100)
    >>> sequences, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=50)))
    >>> sequences.shape, labels.shape
    (torch.Size([50, 8]), torch.Size([50]))
    """

    def __init__(
        self,
        mode: str = "train",
        num_samples: int | None = None,
        *,
        task: CompositeFunctions | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if mode not in MODES:
            raise DataError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.task, self.mode = task or CompositeFunctions(), mode
        size = num_samples if num_samples is not None else self.task.samples(MODES[mode])
        if size is None or size < 1:
            raise DataError(f"num_samples must be at least 1, got {size}")
        generator = torch.Generator(device).manual_seed(seed)
        self.tokens, targets, self.group = self.task.batch(MODES[mode], size, self.task.length, generator)
        self.labels = targets[:, 0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]
