"""The one training loop.

    epoch 0: validate
    epoch e: for each batch: loss -> gradients -> clip -> AdamW at the schedule's rate; validate; checkpoint

Where an average of the weights is kept, it is what is validated and what the best epoch leaves behind.

accelerate supplies the device, mixed precision and data-parallel processes. A batch is what one step of the optimiser
sees: processes share it, `gradient_accumulation` cuts each share further, and neither changes the result beyond
rounding. All randomness of an epoch is drawn from (seed, epoch), so that a run killed between two checkpoints repeats
the lost epoch exactly.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, send_to_device, set_seed
from torch import Tensor, nn

from mambakit.errors import DataError, MambakitError, TrainingDiverged
from mambakit.training.artefacts import exclusive, remove_leftovers
from mambakit.training.average import WeightAverage
from mambakit.training.batches import SampleMeans, TrainingData, derived_seed, epoch_order, process_share
from mambakit.training.captured import CapturedGradients, capturable
from mambakit.training.checkpoint import (
    Checkpoint,
    CheckpointState,
    Fingerprint,
    check_fingerprint,
    checkpoints_folder,
    clear_checkpoints,
    copy_optimizer,
    copy_weights,
    latest_checkpoint,
    load_optimizer,
    load_weights,
    make_fingerprint,
    save_checkpoint,
)
from mambakit.training.config import TrainingConfig
from mambakit.training.divergence import find_origin
from mambakit.training.optimizer import learning_rate, make_optimizer
from mambakit.training.out_of_memory import out_of_memory_explained
from mambakit.training.progress import EpochProgress
from mambakit.training.record import (
    EpochEntry,
    TrainingRecord,
    best_epoch,
    is_finished,
    make_record,
    validation_losses,
)
from mambakit.training.tracking import Tracking

Objective = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Tensor]]]
"""`objective(model, batch)` returns the mean loss over the batch, and further means by name (an empty dict: none).

It calls `model` like a function, once; under several processes that is a wrapper without the model's own attributes.
One that depends on model and batch alone, and asks nothing of the host, may be captured (`fit`).
"""


def fit(
    model: nn.Module,
    objective: Objective,
    training_data: TrainingData,
    validation_data: TrainingData,
    config: TrainingConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    description: str = "training",
    on_epoch: Callable[[EpochEntry], None] | None = None,
    tracking: Tracking | None = None,
    prepare: Callable[[Any], Any] | None = None,
    capture: bool = False,
) -> TrainingRecord:
    """Train `model` in place; it ends with the weights of the best epoch, in eval mode, on the device of accelerate.

    That device is a GPU where there is one; ACCELERATE_USE_CPU=true in the environment keeps to the CPU. Under
    `accelerate launch` or torchrun every process calls this with the same arguments. The global random generators
    are seeded anew. The best epoch is the one with the lowest validation loss, and may be epoch 0, before any step.

    Args:
        objective: see `Objective`.
        run_dir: where checkpoints go, in its folder `checkpoints`, after each epoch; None writes nothing. One run at
            a time may use it.
        resume: go on from the newest checkpoint in `run_dir`, to the weights that an uninterrupted run has (bit for
            bit on the CPU with the same threads). Without a checkpoint the run starts afresh; a finished run returns
            its record at once. If False, checkpoints of an earlier run in `run_dir` are removed.
        quiet: show nothing.
        on_epoch: called in the main process with each new entry of the history, after its checkpoint is written.
        tracking: a tool that gets each new entry as well.
        prepare: what becomes of a batch on the host before the objective sees it.
        capture: whether the objective depends on model and batch alone and never waits for the device: on one GPU
            loss and gradients of a batch are then one CUDA graph, replayed; where that fails, steps are taken as ever.

    Raises:
        TrainingDiverged: the loss or the gradient is not finite; the message says since when and where.
        OutOfMemory: a batch does not fit; the message says what to lower.
        ArtefactError: a checkpoint cannot be written, or the one to resume was made with other settings, another
            model or other data.
        DataError: there is no training data or no validation data.
        KeyboardInterrupt: as it came; the last checkpoint stays.
    """
    for name, data in (("training_data", training_data), ("validation_data", validation_data)):
        if len(data) == 0:
            raise DataError(f"{name} is empty: expected at least one sample")
    if resume and run_dir is None:
        raise MambakitError("resume=True needs run_dir, the folder of the run to go on with")
    accelerator = _make_accelerator(config, tracking)
    folder = None if run_dir is None else Path(run_dir)
    with ExitStack() as stack:
        if folder is not None and accelerator.is_main_process:
            stack.enter_context(exclusive(checkpoints_folder(folder)))
            remove_leftovers(checkpoints_folder(folder))
            if not resume:
                clear_checkpoints(folder)
        accelerator.wait_for_everyone()
        if tracking is not None:
            stack.enter_context(tracking.started(accelerator, config))
        stack.enter_context(out_of_memory_explained(config))
        prepared = stack.enter_context(_prepared(accelerator, model))
        run = _Run(accelerator, model, prepared, objective, training_data, validation_data, config, prepare, capture)
        if folder is not None:
            run.fingerprint = make_fingerprint(model, config, training_data, validation_data)
            if resume:
                run.restore(folder)
        quiet = quiet or not accelerator.is_main_process
        with EpochProgress(description, config.epochs, max(0, len(run.history) - 1), quiet) as progress:
            while not is_finished(run.history, config):
                entry = run.next_epoch(progress)
                if folder is not None:
                    run.save(folder)
                progress.epoch_ended(run.history, is_finished(run.history, config))
                if tracking is not None:
                    tracking.send(accelerator, entry)
                if on_epoch is not None and accelerator.is_main_process:
                    on_epoch(entry)
        load_weights(model, run.best)
    model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return make_record(run.history, config, parameters)


class _Run:
    """One run of training: its model, optimiser and history."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        prepared: nn.Module,
        objective: Objective,
        training_data: TrainingData,
        validation_data: TrainingData,
        config: TrainingConfig,
        prepare: Callable[[Any], Any] | None,
        capture: bool,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.prepared = prepared
        self.objective = objective
        self.training_data = training_data
        self.validation_data = validation_data
        self.config = config
        self.prepare = prepare
        self.optimizer = make_optimizer(model, config)
        self.scaled_optimizer = accelerator.prepare_optimizer(self.optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        captured = capture and capturable(accelerator, config)
        self.captured = CapturedGradients(self._gradients, self.parameters) if captured else None
        self.average = None if config.average_decay is None else WeightAverage(self.parameters, config.average_decay)
        self.steps_per_epoch = math.ceil(len(training_data) / config.batch_size)
        self.history: list[EpochEntry] = []
        self.best: dict[str, Tensor] = {}
        self.fingerprint: Fingerprint = {}

    def next_epoch(self, progress: EpochProgress) -> EpochEntry:
        """Train for an epoch unless it is epoch 0, validate, and add to the history."""
        epoch = len(self.history)
        started = time.perf_counter()
        self._seed(epoch)
        entry: EpochEntry = {"epoch": epoch}
        if epoch > 0:
            entry |= self._train(epoch, progress)
        with nullcontext() if self.average is None else self.average.in_place():
            entry |= {f"validation_{name}": value for name, value in self._validate(epoch).items()}
            entry["seconds"] = time.perf_counter() - started
            self.history.append(entry)
            if best_epoch(self.history) == epoch:
                self.best = copy_weights(self.model)
        return entry

    def save(self, folder: Path) -> None:
        """Write a checkpoint, from the main process; the others wait until it is there."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = CheckpointState(
                fingerprint=self.fingerprint,
                history=self.history,
                gradient_scaler=None if scaler is None else scaler.state_dict(),
            )
            weights, optimizer = copy_weights(self.model), copy_optimizer(self.optimizer)
            average = {} if self.average is None else self.average.copy()
            save_checkpoint(folder, Checkpoint(weights, optimizer, self.best, average, state))
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> None:
        """Take over the newest checkpoint, if there is one."""
        with self.accelerator.main_process_first():  # which removes damaged ones
            checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            return
        check_fingerprint(folder, checkpoint.state.fingerprint, self.fingerprint)
        load_weights(self.model, checkpoint.weights)
        load_optimizer(self.optimizer, checkpoint.optimizer)
        if self.average is not None:
            self.average.load(checkpoint.average)
        if checkpoint.state.gradient_scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state.gradient_scaler)
        self.history = checkpoint.state.history
        self.best = checkpoint.best

    def _seed(self, epoch: int) -> None:
        set_seed(derived_seed(self.config.seed, epoch, self.accelerator.process_index))

    def _train(self, epoch: int, progress: EpochProgress) -> EpochEntry:
        self.model.train()
        means, norms = SampleMeans(), []
        rate = self.config.learning_rate
        losses, steps = validation_losses(self.history), self.config.epochs * self.steps_per_epoch
        order = epoch_order(len(self.training_data), self.config.seed, epoch)
        for position, indices in enumerate(order.split(self.config.batch_size)):
            rate = learning_rate(self.config, (epoch - 1) * self.steps_per_epoch + position, steps, losses)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, norm = self._step(indices, means)
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._scaler_will_adapt()):
                raise self._diverged(f"epoch {epoch}, step {position + 1} of {self.steps_per_epoch}", loss, indices)
            self._change_weights()
            if self.average is not None:
                self.average.update((epoch - 1) * self.steps_per_epoch + position)
            if math.isfinite(norm):
                norms.append(norm)
            progress.within_epoch(epoch, (position + 1) / self.steps_per_epoch)
        entry: EpochEntry = {
            f"train_{name}": value for name, value in means.over_all_processes(self.accelerator).items()
        }
        return entry | {"learning_rate": rate, "gradient_norm": sum(norms) / max(1, len(norms))}

    def _step(self, indices: Tensor, means: SampleMeans) -> tuple[float, float]:
        """Compute the clipped gradient of a batch; returns its loss (this process's share) and the gradient's norm."""
        accelerator = self.accelerator
        self.optimizer.zero_grad()
        share, counted = process_share(indices, accelerator.num_processes, accelerator.process_index)
        parts = [part for part in share.tensor_split(self.config.gradient_accumulation) if len(part)]
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts, start=1):
            samples = len(part) if counted else 0
            batch = self._batch(self.training_data, part)
            # Gradients are averaged over the processes once, with the last part.
            with nullcontext() if number == len(parts) else accelerator.no_sync(self.prepared):
                if self.captured is not None:
                    loss, metrics = self.captured(batch)
                else:
                    loss, metrics = self._gradients(batch, samples * accelerator.num_processes / len(indices))
            means.add(loss, metrics, samples)
            total = total + loss.detach() * (len(part) / len(share))
        norm = accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        # One wait for the device instead of two.
        loss_value, norm_value = torch.stack([total, norm.to(total.dtype)]).tolist()
        return loss_value, norm_value

    def _gradients(self, batch: Any, weight: float = 1.0) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and metrics of a batch, whose gradient, times `weight`, is added to that of the parameters."""
        loss, metrics = self.objective(self.prepared, batch)
        self.accelerator.backward(loss * weight)
        return loss, metrics

    def _change_weights(self) -> None:
        if self.accelerator.scaler is None:
            # Past accelerate's own step, which searches the disk for a package each time (0.2 ms).
            self.optimizer.step()
        else:
            self.scaled_optimizer.step()

    @torch.no_grad()
    def _validate(self, epoch: int) -> dict[str, float]:
        self.model.eval()
        means = SampleMeans()
        for indices in torch.arange(len(self.validation_data)).split(self.config.batch_size):
            share, counted = process_share(indices, self.accelerator.num_processes, self.accelerator.process_index)
            # Not `prepared`, which makes processes wait for each other.
            loss, metrics = self.objective(self.model, self._batch(self.validation_data, share))
            means.add(loss, metrics, counted)
        values = means.over_all_processes(self.accelerator)
        if not math.isfinite(values["loss"]):
            raise self._validation_diverged(epoch)
        return values

    def _batch(self, data: TrainingData, indices: Tensor) -> Any:
        batch = data.batch(indices)
        return send_to_device(batch if self.prepare is None else self.prepare(batch), self.accelerator.device)

    def _scaler_will_adapt(self) -> bool:
        """Whether a gradient that is not finite only tells fp16's scaler to scale less, and to skip this step."""
        scaler = self.accelerator.scaler
        # At a scale of 1 the scaler adds nothing: what overflows there overflows by itself.
        return scaler is not None and scaler.get_scale() > 1

    def _diverged(self, place: str, loss: float, indices: Tensor) -> TrainingDiverged:
        accelerator = self.accelerator
        share, _ = process_share(indices, accelerator.num_processes, accelerator.process_index)
        what = (
            f"the loss is {loss}"
            if not math.isfinite(loss)
            else f"the loss is {loss:.4g} but its gradient is not finite"
        )
        return self._divergence(f"{place}: {what}", self.training_data, share)

    def _validation_diverged(self, epoch: int) -> TrainingDiverged:
        for indices in torch.arange(len(self.validation_data)).split(self.config.batch_size):
            loss, _ = self.objective(self.model, self._batch(self.validation_data, indices))
            if not torch.isfinite(loss):
                break
        return self._divergence(
            f"epoch {epoch}, in validation: the loss is {float(loss)}", self.validation_data, indices
        )

    def _divergence(self, what: str, data: TrainingData, indices: Tensor) -> TrainingDiverged:
        origin = find_origin(self.model, self.objective, self._batch(data, indices), indices)
        clip_norm = self.config.clip_norm
        clipping = "set clip_norm (1.0 is usual)" if clip_norm is None else f"lower clip_norm (now {clip_norm})"
        return TrainingDiverged(
            f"training diverged in {what}. {origin} "
            f"Check the data, or lower learning_rate (now {self.config.learning_rate:g}), or {clipping}."
        )


def _make_accelerator(config: TrainingConfig, tracking: Tracking | None) -> Accelerator:
    known = AcceleratorState._shared_state
    if known and AcceleratorState().mixed_precision != config.mixed_precision:
        # accelerate fixes the precision at its first use in a process; a second run may need another one.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if tracking is None else tracking.kind,
        project_dir=None if tracking is None else tracking.folder,
        # Said outright, so that nothing in the environment divides the loss a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise MambakitError("mixed_precision='fp16' needs a GPU: choose 'bf16' or 'no' on the CPU")
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise MambakitError(
            f"accelerate is set up for {accelerator.distributed_type.value}: expected plain data parallelism; "
            "start with `accelerate launch --multi_gpu` or torchrun"
        )
    return accelerator


@contextmanager
def _prepared(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """`model` as accelerate needs it: on its device, its forward under autocast, wrapped to average gradients."""
    # accelerate leaves these on the model: a deep copy would call the original's forward, a second run not be wrapped.
    traces = {"forward", "_original_forward", "_is_accelerate_prepared"} - model.__dict__.keys()
    try:
        yield accelerator.prepare_model(model)
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for name in traces:
            model.__dict__.pop(name, None)
