"""The batches of a run: those of every member at every step, known from its seed and the step alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambakit.lab.tasks import Batch, Task
from mambakit.training.batches import derived_seed

_SAMPLES, _ORDER, _FRESH, _TRAINED, _HELD_OUT, _LENGTH = range(1, 7)  # streams of random numbers that share nothing

_LATE = 1 << 30  # a step past any curriculum


class TrainingBatches:
    """What members train on: `batches(step)`, tokens (members, batch, length) and targets (members, batch, answers).

    A task with a number of training samples has them drawn once for each seed and gone through in an order of each
    epoch's own, the rest of an epoch that fills no batch left out; another has every batch drawn afresh.

    Args:
        seeds: of the members; equal seeds see equal batches.
        device: where they are drawn and stay.
    """

    def __init__(self, task: Task, seeds: Sequence[int], batch_size: int, device: torch.device) -> None:
        self._task, self._seeds, self._size, self._device = task, list(seeds), batch_size, device
        self._samples = task.samples(task.splits[0])
        self._drawn: dict[int, Batch] = {}
        self._orders: tuple[int, dict[int, Tensor]] = (-1, {})
        if self._samples is not None:
            self._drawn = {seed: self._draw(self._samples, 0, _SAMPLES, seed) for seed in self._seeds}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        if self._samples is None:
            found = {seed: self._draw(self._size, step, _FRESH, seed, step) for seed in dict.fromkeys(self._seeds)}
        else:
            epoch, place = divmod(step, self._samples // self._size)
            if self._orders[0] != epoch:
                orders = {seed: self._order(seed, epoch) for seed in self._drawn}
                self._orders = epoch, orders
            chosen = slice(place * self._size, (place + 1) * self._size)
            found = {}
            for seed, drawn in self._drawn.items():
                rows = self._orders[1][seed][chosen]
                found[seed] = Batch(*(part[rows] for part in drawn))
        batches = [found[seed] for seed in self._seeds]
        return torch.stack([b.tokens for b in batches]), torch.stack([b.targets for b in batches])

    def first(self, count: int) -> Batch:
        """`count` training samples of every member, to evaluate on; (members, count, ...) each."""
        of_seeds = {
            seed: Batch(*(part[:count] for part in self._drawn[seed]))
            if self._drawn
            else self._draw(count, _LATE, _TRAINED, seed)
            for seed in self._seeds
        }
        return Batch(*(torch.stack(parts) for parts in zip(*(of_seeds[seed] for seed in self._seeds), strict=True)))

    def _draw(self, size: int, step: int, *stream: int) -> Batch:
        generator = torch.Generator(self._device).manual_seed(derived_seed(*stream))
        split = self._task.splits[0]
        return self._task.batch(split, size, self._task.length_at(step, split), generator)

    def _order(self, seed: int, epoch: int) -> Tensor:
        assert self._samples is not None
        generator = torch.Generator(self._device).manual_seed(derived_seed(_ORDER, seed, epoch))
        return torch.randperm(self._samples, generator=generator, device=self._device)


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
