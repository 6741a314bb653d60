"""From samples to batches: the order of an epoch, the share of each process, and means over samples."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # checkpoints need this file and not the second that accelerate takes to load
    from accelerate import Accelerator

# Values wait on the device for this many batches: long enough to rarely wait for it, short enough to hold no memory.
_FOLD_EVERY = 256


class TrainingData(Protocol):
    """Samples that can be gathered by index.

    `batch` gets a LongTensor (samples,) on the CPU and returns tensors in any nesting of dicts, lists and tuples, the
    samples along their first dimension. Gather with one indexing operation, not sample by sample.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, /) -> Any: ...


def derived_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers >= 0; unlike with a sum, (1, 0) and (0, 1) give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch, (samples,) int64: known from the seed and the epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))


def process_share(indices: Tensor, processes: int, rank: int) -> tuple[Tensor, int]:
    """What process `rank` computes of a batch, and how many of these samples count.

    Of a batch smaller than the number of processes some get nothing. They take one sample that counts zero: every
    process has to come along when gradients are averaged.
    """
    share = indices.tensor_split(processes)[rank]
    return (share, len(share)) if len(share) else (indices[:1], 0)


class SampleMeans:
    """Means over samples of the loss and the metrics of many batches, without waiting for the device at each one."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rows: list[tuple[Tensor, ...]] = []
        self._counts: list[int] = []
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._samples = 0

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], samples: int) -> None:
        """Take the means over a batch of `samples` samples, each a tensor of one number."""
        names = ("loss", *metrics)
        if not self._names:
            self._names = names
            self._sums = torch.zeros(len(names), dtype=torch.float64)
        elif names != self._names:
            raise ValueError(
                f"the objective must return the same metrics for each batch: {self._names[1:]}, {names[1:]}"
            )
        self._rows.append((loss.detach(), *(value.detach() for value in metrics.values())))
        self._counts.append(samples)
        if len(self._rows) == _FOLD_EVERY:
            self._fold()

    def over_all_processes(self, accelerator: "Accelerator") -> dict[str, float]:
        """The means, equal in every process; all have to call this together."""
        self._fold()
        totals = torch.cat([self._sums, torch.tensor([self._samples], dtype=torch.float64)])
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
        means = (totals[:-1] / totals[-1]).tolist()
        return dict(zip(self._names, means, strict=True))

    def _fold(self) -> None:
        if not self._rows:
            return
        columns = [torch.stack(column).cpu().double() for column in zip(*self._rows, strict=True)]
        counts = torch.tensor(self._counts, dtype=torch.float64)  # (batches,)
        self._sums += (torch.stack(columns) * counts).sum(dim=1)  # (names, batches) -> (names,)
        self._samples += sum(self._counts)
        self._rows, self._counts = [], []


def named_tensors(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested batch with its place in it: `batch['x']`, `batch[0]`, ..."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for position, value in enumerate(batch):
            yield from named_tensors(value, f"{name}[{position}]")
