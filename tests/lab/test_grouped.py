"""Grouped training: each member of a group ends as it does alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.lab.data import TrainingBatches, held_out
from mambakit.lab.grouped import GroupedAdamW, GroupedModels, _plain_attention, losses, seeded, train_step
from mambakit.lab.models import MODELS, MambaForComposite
from mambakit.lab.tasks import CompositeFunctions, Parity
from mambakit.training.optimizer import parameter_groups

TASK = CompositeFunctions(samples_per_pair=8)
SEEDS, GAMMAS, RATES = (0, 1, 2), (0.5, 0.8, 1.0), (1e-3, 3e-3, 1e-2)
STEPS, BATCH, DECAY, CLIP = 4, 16, 0.1, 0.5
CPU = torch.device("cpu")


def member(name: str, mixer: str, index: int) -> MambaForComposite:
    options: dict[str, Any] = {} if name.startswith("transformer") else {"mixer": mixer, "d_state": 8}
    return seeded(lambda: MODELS[name](2, GAMMAS[index], d_model=16, **options), SEEDS[index])  # type: ignore


def trained_together(name: str, mixer: str, *, loop: bool) -> GroupedModels:
    grouped = GroupedModels([member(name, mixer, index) for index in range(3)], loop=loop)
    optimizer = GroupedAdamW(grouped)
    batches = TrainingBatches(TASK, SEEDS, BATCH, CPU)
    paces = optimizer.paces([RATES] * STEPS, [DECAY] * 3)
    for step in range(STEPS):
        train_step(grouped, optimizer, *batches(step), paces[step], clip=CLIP)
    return grouped


def trained_alone(name: str, mixer: str, index: int) -> dict[str, Tensor]:
    """By torch's own AdamW and clipping."""
    model = member(name, mixer, index)
    optimizer = torch.optim.AdamW(parameter_groups(model, DECAY), lr=RATES[index])
    batches = TrainingBatches(TASK, [SEEDS[index]], BATCH, CPU)
    for step in range(STEPS):
        tokens, targets = batches(step)
        torch.nn.functional.cross_entropy(model(tokens[0]), targets[0, :, 0]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        *(("standard", mixer) for mixer in ("mamba", "mamba2", "mamba3")),
        ("ones", "mamba2"),
        ("residual", "mamba3"),
        ("transformer-conv", ""),
    ],
)
def test_each_member_ends_as_it_does_alone(name: str, mixer: str, loop: bool) -> None:
    grouped = trained_together(name, mixer, loop=loop)
    for index in range(3):
        weights = grouped.weights(index)
        for parameter, alone in trained_alone(name, mixer, index).items():
            torch.testing.assert_close(weights[parameter], alone.detach(), rtol=2e-3, atol=2e-5, msg=parameter)


def test_one_members_gradient_does_not_clip_another() -> None:
    grouped = GroupedModels([torch.nn.Linear(3, 1, bias=False) for _ in range(2)])
    optimizer = GroupedAdamW(grouped)
    gradient = torch.tensor([[[3.0, 0.0, 4.0]], [[0.1, 0.0, 0.0]]])
    norms = optimizer.step([gradient], optimizer.paces([[1.0, 1.0]], [0.0, 0.0])[0], clip=1.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.1]))
    # After one step the means are a tenth of the clipped gradients.
    torch.testing.assert_close(optimizer.means, torch.tensor([[0.06, 0.0, 0.08], [0.01, 0.0, 0.0]]))


def test_losses_count_what_was_asked_for_alone() -> None:
    logits = torch.randn(2, 3, 4, 5)
    targets = torch.randint(0, 5, (2, 3, 4))
    targets[1, :, :2] = -100
    expected = [
        torch.nn.functional.cross_entropy(logits[index].flatten(0, 1), targets[index].flatten()) for index in range(2)
    ]
    torch.testing.assert_close(losses(logits, targets), torch.stack(expected))


def test_a_model_of_the_group_has_the_groups_weights() -> None:
    grouped = trained_together("standard", "mamba2", loop=True)
    tokens = held_out(TASK, "test", 5, CPU).tokens
    together = grouped(tokens.expand(3, -1, -1), 1)
    for index in range(3):
        torch.testing.assert_close(grouped.model(index)(tokens, 1), together[index])


def test_an_epoch_shows_every_sample_once_and_each_epoch_in_another_order() -> None:
    task = CompositeFunctions(samples_per_pair=16)
    batches = TrainingBatches(task, [3], 24, CPU)  # 240 samples: ten steps an epoch
    epochs = [torch.cat([batches(10 * epoch + step)[0][0] for step in range(10)]) for epoch in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].unique(dim=0), epochs[1].unique(dim=0))


@pytest.mark.parametrize("task", [TASK, Parity()])
def test_batches_follow_from_seed_and_step_alone(task: Any) -> None:
    together, alone = TrainingBatches(task, [5, 9], 8, CPU), TrainingBatches(task, [9], 8, CPU)
    for step in (0, 7, 40):
        tokens, targets = together(step)
        assert torch.equal(tokens[1], alone(step)[0][0])
        assert torch.equal(targets[1], alone(step)[1][0])
        assert not torch.equal(tokens[0], tokens[1])


def test_models_made_by_threads_are_those_made_alone() -> None:
    together = threading.Barrier(2)

    def make() -> Tensor:
        first = torch.rand(3)
        time.sleep(0.05)  # for the other to draw meanwhile, were it let
        return torch.cat([first, torch.rand(3)])

    def made_beside_another(seed: int) -> Any:
        together.wait()
        return seeded(make, seed)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(made_beside_another, (0, 1)))
    for seed, values in enumerate(found):
        assert torch.equal(values, seeded(make, seed))


def test_attention_is_as_it_was_when_the_last_of_two_runs_has_left_its_plain_form() -> None:
    switched = torch.backends.cuda.flash_sdp_enabled
    before = switched()
    first, second = _plain_attention(), _plain_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as one of two threads
    assert not switched()
    second.__exit__(None, None, None)
    assert switched() == before
