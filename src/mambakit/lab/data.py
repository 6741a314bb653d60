"""The batches of a run: those of every member at every step, known from its seed and the step alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.lab.tasks import Batch, Task
from mambakit.training.batches import derived_seed

_SAMPLES, _ORDER, _FRESH, _TRAINED, _HELD_OUT, _LENGTH = range(1, 7)  # streams of random numbers that share nothing

_LATE = 1 << 30  # a step past any curriculum


class TrainingBatches:
    """What members train on: tokens (members, batch, length) and targets (members, batch, answers) of every step.

    A task with a number of training samples has them drawn once for each seed and gone through in an order of each
    epoch's own, the rest of an epoch that fills no batch left out; another has every batch drawn afresh.

    A batch is made in two halves: `prepare` does what is drawn with a seed, `taken` what a CUDA graph can do again and
    again with the number of the step on the device. A call does both.

    Args:
        seeds: of the members; equal seeds see equal batches.
        device: where they are drawn and stay.
    """

    def __init__(self, task: Task, seeds: Sequence[int], batch_size: int, device: torch.device) -> None:
        self._task, self._size, self._device = task, batch_size, device
        self._seeds = list(dict.fromkeys(seeds))
        self._of_member = torch.tensor([self._seeds.index(seed) for seed in seeds], device=device)
        self._samples = task.samples(task.splits[0])
        self._ready: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._shape = torch.Size()
        if self._samples is not None:
            self._drawn = self._stacked(self._samples, 0, _SAMPLES)
            self._order = torch.zeros(len(self._seeds), self._samples, dtype=torch.int64, device=device)
            self._epoch = -1
            self._within = torch.arange(batch_size, device=device)
            self._shape = torch.Size([batch_size, self._drawn.tokens.shape[2]])

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        self.prepare(step)
        return self.taken(step)

    def prepare(self, step: int) -> torch.Size:
        """Make ready what `taken` takes at `step`; the shape of a member's tokens there."""
        if self._samples is None:
            batch = self._stacked(self._size, step, _FRESH, step)
            self._shape = batch.tokens.shape[1:]
            ready = self._ready.setdefault(self._shape, (batch.tokens, batch.targets))
            for place, tensor in zip(ready, batch, strict=False):
                place.copy_(tensor)
        elif self._epoch != step // self._in_epoch:
            self._epoch = step // self._in_epoch
            for order, seed in zip(self._order, self._seeds, strict=True):
                generator = torch.Generator(self._device).manual_seed(derived_seed(_ORDER, seed, self._epoch))
                order.copy_(torch.randperm(self._samples, generator=generator, device=self._device))
        return self._shape

    def taken(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and targets of `step`, for which `prepare` was called; it may be a number on the device."""
        if self._samples is None:
            tokens, targets = self._ready[self._shape]
            return tokens[self._of_member], targets[self._of_member]
        rows = self._order[:, step % self._in_epoch * self._size + self._within][self._of_member]
        of_member = self._of_member[:, None]
        return self._drawn.tokens[of_member, rows], self._drawn.targets[of_member, rows]

    def first(self, count: int) -> Batch:
        """`count` training samples of every member, to evaluate on; (members, count, ...) each."""
        if self._samples is None:
            found = self._stacked(count, _LATE, _TRAINED)
        else:
            found = Batch(*(part[:, :count] for part in self._drawn))
        return Batch(*(part[self._of_member] for part in found))

    @property
    def _in_epoch(self) -> int:
        """Steps of an epoch."""
        assert self._samples is not None
        return self._samples // self._size

    def _stacked(self, size: int, step: int, stream: int, *after: int) -> Batch:
        """A batch for every seed, (seeds, size, ...) each."""
        split = self._task.splits[0]
        length = self._task.length_at(step, split)
        batches = []
        for seed in self._seeds:
            generator = torch.Generator(self._device).manual_seed(derived_seed(stream, seed, *after))
            batches.append(self._task.batch(split, size, length, generator))
        return Batch(*(torch.stack(parts) for parts in zip(*batches, strict=True)))


def held_out(
    task: Task, split: str, size: int, device: torch.device, length: int | None = None, part: int = 0
) -> Batch:
    """`size` samples of a split that is not trained on: the same ones whatever the seed of a member.

    Args:
        length: tokens; None for the split's own.
        part: other samples for each.
    """
    stream = _HELD_OUT if length is None else _LENGTH
    seed = derived_seed(stream, task.splits.index(split), length or 0, part)
    generator = torch.Generator(device).manual_seed(seed)
    return task.batch(split, size, length or task.length_at(0, split), generator)
