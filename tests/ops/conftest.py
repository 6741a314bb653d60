"""Operations are tested with all uninitialised memory poisoned: what a kernel forgets to write is NaN."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from tests.ops.backends import DEVICE


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with torch.device(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
