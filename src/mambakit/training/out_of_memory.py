"""Running out of memory in training, told as what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mambakit.errors import OutOfMemory
from mambakit.training.config import TrainingConfig

# torch's CPU allocator raises a plain RuntimeError; these are its words on Linux and macOS, and on Windows.
_ALLOCATOR_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def out_of_memory_explained(config: TrainingConfig) -> Iterator[None]:
    """Turn what torch and the kernels raise when memory runs out into an OutOfMemory with the way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in _ALLOCATOR_WORDS):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OutOfMemory(
            f"training ran out of memory ({reason}). Cut the batch into more parts with gradient_accumulation (now "
            f"{config.gradient_accumulation}), which leaves the result as it is, or lower batch_size (now "
            f"{config.batch_size}), d_model or num_layers"
        ) from error
