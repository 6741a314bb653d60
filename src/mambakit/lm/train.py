"""Training a language model from scratch, on windows of a token stream.

    loss = mean of -log p(next token | tokens before it in its document and window), in nats

A budget in minutes becomes a number of epochs before training starts, by timing a few steps, and is stored with the
run; so the schedule is known from the first step and a resumed run repeats it.
"""

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import ArtefactError, DataError
from mambakit.lm.config import MambaConfig
from mambakit.lm.data import Draws, TokenStream, Windows
from mambakit.lm.model import MambaForCausalLM
from mambakit.training import TrainingConfig, TrainingRecord, fit
from mambakit.training.artefacts import read_json, write_json
from mambakit.training.captured import CapturedGradients, capturable
from mambakit.training.optimizer import make_optimizer
from mambakit.training.processes import decided_by_first

# Byte-level text of a megabyte, two cores, twenty minutes.
LM_TRAINING = TrainingConfig.model_validate(
    {
        "epochs": 10,
        "batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "warmup_fraction": 0.05,
        "min_learning_rate_ratio": 0.05,
        "patience": None,
    }
)
_TIMED_STEPS = 6
_WARM_UP_STEPS = 3  # on a GPU the third is captured
_VALIDATIONS = 10  # of a run with a budget


@dataclass(frozen=True)
class Plan:
    """How long a run is: epochs of so many windows."""

    epochs: int
    windows: int


def untrained(config: MambaConfig, seed: int) -> MambaForCausalLM:
    """A model with initial weights drawn by the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(config)


def train(
    model: MambaForCausalLM,
    training: TokenStream,
    validation: TokenStream,
    settings: TrainingConfig,
    *,
    context: int,
    minutes: float | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> TrainingRecord:
    """Train in place; the model ends with the weights of its best epoch.

    Args:
        settings: `epochs` are passes over the tokens; with `minutes` they follow from that.
        context: tokens of a window.
        minutes: about how long to train.
        run_dir, resume: as in `mambakit.training.fit`.

    Raises DataError for texts shorter than a window, and what `fit` raises.
    """
    held_out, windows = Windows(validation, context), Windows(training, context)
    plan = decided_by_first(lambda: _plan(model, windows, held_out, settings, minutes, run_dir if resume else None))
    if run_dir is not None:
        decided_by_first(lambda: write_json(run_dir / "plan.json", plan.__dict__))
    draws = Draws(windows, plan.windows)
    return fit(
        model,
        objective,
        draws,
        held_out,
        settings.model_copy(update={"epochs": plan.epochs}),
        run_dir=run_dir,
        resume=resume,
        quiet=quiet,
        description="training",
        prepare=partial(prepare, draws=draws),
        capture=True,
    )


def objective(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of what `prepare` made of a batch."""
    tokens = batch["tokens"]
    if "bounds" not in batch:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss, {}
    bounds = torch.tensor(batch["bounds"], device=tokens.device)
    return model(input_ids=tokens, labels=tokens, cu_seqlens=bounds, use_cache=False).loss, {}


def prepare(batch: Mapping[str, Tensor], draws: Draws | None = None) -> dict[str, Any]:
    """Windows as the objective takes them: their tokens; where documents share a row, all rows as a pack, each document
    on its own, and their bounds as numbers.

    Args:
        batch: of `Windows`; or of `draws`, in whose place windows are drawn.
    """
    if draws is not None and "probe" in batch:
        batch = draws.draw(len(batch["probe"]))
    tokens, starts = batch["tokens"], batch["starts"]
    if not starts[:, 1:].any():
        return {"tokens": tokens}
    heads = starts.clone()
    heads[:, 0] = True
    return {"tokens": tokens.reshape(1, -1), "bounds": [*heads.flatten().nonzero()[:, 0].tolist(), tokens.numel()]}


def _plan(
    model: MambaForCausalLM,
    windows: Windows,
    held_out: Windows,
    settings: TrainingConfig,
    minutes: float | None,
    resumed: Path | None,
) -> Plan:
    if resumed is not None and (resumed / "plan.json").is_file():
        stored = read_json(resumed / "plan.json")
        try:
            return Plan(**stored)
        except TypeError as error:
            raise ArtefactError(f"{resumed / 'plan.json'} is damaged: {json.dumps(stored)[:80]}") from error
    if minutes is None:
        return Plan(settings.epochs, len(windows))
    if minutes <= 0:
        raise DataError(f"minutes must be above 0, got {minutes}")
    seconds_a_step, seconds_a_validation = _timed(model, windows, held_out, settings)
    steps = max(1.0, (60 * minutes - (_VALIDATIONS + 1) * seconds_a_validation) / seconds_a_step)
    return Plan(_VALIDATIONS, max(settings.batch_size, round(steps / _VALIDATIONS) * settings.batch_size))


def _timed(
    model: MambaForCausalLM, windows: Windows, held_out: Windows, settings: TrainingConfig
) -> tuple[float, float]:
    """Seconds of a step and of a validation, taken on a copy of the model."""
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    device, half = accelerator.device, settings.mixed_precision != "no"
    trial = copy.deepcopy(model).to(device).train()
    optimizer = make_optimizer(trial, settings)

    def gradients(batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, metrics = objective(trial, batch)
        loss.backward()
        return loss, metrics

    captured = capturable(accelerator, settings)
    step = CapturedGradients(gradients, list(trial.parameters())) if captured else gradients
    times = []
    for number in range(_WARM_UP_STEPS + _TIMED_STEPS):
        started = time.perf_counter()
        indices = (torch.arange(settings.batch_size) + number * settings.batch_size) % len(windows)
        loss, _ = step(send_to_device(prepare(windows.batch(indices)), device))
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    seconds = sum(times[_WARM_UP_STEPS:]) / _TIMED_STEPS
    validations = math.ceil(len(held_out) / settings.batch_size)
    # Reading costs about a third of a step; as much as one that is captured, for it is not.
    return seconds, validations * seconds / (1 if captured else 3)
