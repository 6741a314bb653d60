"""Steps without the host: what they leave is what plain steps leave, captured or not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.lab.data import TrainingBatches
from mambakit.lab.grouped import GroupedAdamW, GroupedModels, seeded, train_step
from mambakit.lab.models import MambaForComposite
from mambakit.lab.steps import TrainingSteps
from mambakit.lab.tasks import CompositeFunctions, Parity

SEEDS, BATCH, CLIP, COUNT = (0, 1), 16, 0.5, 14
RATES = [[1e-3 * (step + 1), 2e-3] for step in range(COUNT)]
TASKS = [CompositeFunctions(samples_per_pair=8), Parity(longest=5)]  # 7 steps an epoch; batches of three shapes


def group(device: torch.device) -> tuple[GroupedModels, GroupedAdamW]:
    models = [
        seeded(lambda: MambaForComposite(2, d_model=16, d_state=32, headdim=32), seed).to(device) for seed in SEEDS
    ]
    grouped = GroupedModels(models)
    return grouped, GroupedAdamW(grouped)


def plainly(task: Any, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    grouped, optimizer = group(device)
    batches = TrainingBatches(task, SEEDS, BATCH, device)
    paces = optimizer.paces(RATES, [0.1, 0.1])
    losses = [train_step(grouped, optimizer, *batches(step), paces[step], CLIP) for step in range(COUNT)]
    return grouped.weights(1), torch.stack(losses).mean(0)


def by_steps(task: Any, device: torch.device, capture: bool) -> tuple[dict[str, Tensor], list[float]]:
    grouped, optimizer = group(device)
    batches = TrainingBatches(task, SEEDS, BATCH, device)
    steps = TrainingSteps(grouped, optimizer, batches, optimizer.paces(RATES, [0.1, 0.1]), CLIP, capture)
    for step in range(COUNT):
        steps.take(step)
    assert steps.captures == capture
    return grouped.weights(1), steps.mean_losses()


@pytest.mark.parametrize("task", TASKS)
def test_steps_by_numbers_on_the_device_are_plain_steps(task: Any) -> None:
    device = torch.device("cpu")
    weights, losses = by_steps(task, device, capture=False)
    expected, mean = plainly(task, device)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, msg=name)
    torch.testing.assert_close(torch.tensor(losses), mean, rtol=1e-6, atol=0)


def test_mean_losses_begin_anew_when_they_are_asked_for() -> None:
    device = torch.device("cpu")
    grouped, optimizer = group(device)
    batches = TrainingBatches(TASKS[0], SEEDS, BATCH, device)
    paces = optimizer.paces([[0.0, 0.0]] * COUNT, [0.0, 0.0])  # nothing is learnt: losses follow from batches alone
    steps = TrainingSteps(grouped, optimizer, batches, paces, CLIP, capture=False)
    steps.take(0)
    first = steps.mean_losses()
    steps.go_on_from(0)
    steps.take(0)
    assert steps.mean_losses() == first


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
def test_captured_steps_train_as_others_do(task: Any) -> None:
    device = torch.device("cuda")
    weights, losses = by_steps(task, device, capture=True)
    expected, mean = plainly(task, device)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    torch.testing.assert_close(torch.tensor(losses), mean.double().cpu(), rtol=1e-4, atol=0, check_dtype=False)
