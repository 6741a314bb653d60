"""Running out of memory ends in one line that says what to lower."""

import pytest
import torch
from tests.training.toy import toy_model, training_data, validation_data

from mambakit.errors import OutOfMemory
from mambakit.training import TrainingConfig, fit

CONFIG = TrainingConfig(epochs=1, batch_size=8, gradient_accumulation=2)


def fail_with(error: BaseException) -> None:
    def objective(model, batch):
        raise error

    fit(toy_model(), objective, training_data(), validation_data(), CONFIG, quiet=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127]. DefaultCPUAllocator: can't allocate memory:\nmany bytes"),
    ],
)
def test_the_message_names_what_to_lower_and_what_it_is_now(error: BaseException) -> None:
    with pytest.raises(OutOfMemory, match="training ran out of memory") as caught:
        fail_with(error)
    message = str(caught.value)
    assert "gradient_accumulation (now 2)" in message
    assert "batch_size (now 8), d_model or num_layers" in message
    assert "\n" not in message


def test_memory_that_really_runs_out_is_recognised() -> None:
    def objective(model, batch):
        return torch.empty(2**60, dtype=torch.uint8).sum(), {}

    with pytest.raises(OutOfMemory, match=r"allocate memory|not enough memory"):
        fit(toy_model(), objective, training_data(), validation_data(), CONFIG, quiet=True)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        fail_with(RuntimeError("shapes do not agree"))
