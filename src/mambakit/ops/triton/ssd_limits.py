"""What the GPU's scan of Mamba-2 takes and what it keeps: told without loading Triton."""

import torch

from mambakit.ops.triton import interpreting
from mambakit.ops.triton.counting import ceil_div, power_of_two

_BLOCK = 64  # numbers of a row, or rows, of a state that a program takes
GREATEST_CHUNK = 64  # steps, half of it in float32: what the registers hold of the products of a chunk
LEAST_CHUNK = 16  # steps: what a product on the tensor cores has at least
GREATEST_STATE = 256


def refusal(dtype: torch.dtype, state: int) -> str | None:
    """Why the kernels don't take activations of `dtype` with `state` numbers in a row of the state; None if they do."""
    if dtype == torch.float64:
        return "the GPU's ssd works in float32 and half precision, not in float64"
    if not 0 < state <= GREATEST_STATE:
        return f"the GPU's ssd takes states of 1 to {GREATEST_STATE}, and this is {state}"
    return None


def chunk_of(chunk_size: int, length: int, dtype: torch.dtype) -> int:
    """The steps of a chunk when `chunk_size` are asked for: a power of two, at least 16, no more than hold `length`."""
    chunk, greatest = LEAST_CHUNK, GREATEST_CHUNK // 2 if dtype == torch.float32 else GREATEST_CHUNK
    while chunk < greatest and 2 * chunk <= chunk_size and chunk < length:
        chunk *= 2
    return chunk


def filled(headdim: int, state: int, dtype: torch.dtype) -> tuple[int, int]:
    """The sizes at which the kernels work: in half precision whole blocks, to which others are filled up with zeros.

    A block has at least 64 numbers on a GPU: with Triton 3.6 on Hopper one of 32 bfloat16 ended in an illegal access.
    """
    if dtype == torch.float32:
        return headdim, state
    least = 16 if interpreting() else _BLOCK
    block = min(power_of_two(headdim, least), _BLOCK)
    return ceil_div(headdim, block) * block, power_of_two(state, least)


def kept_chunks(batch: int, length: int, sequences: int | None, chunk: int, initial: bool) -> int:
    """How many states before chunks are kept; of packed `sequences`, at most.

    None of sequences of one chunk without initial states: before it there is nothing.
    """
    if sequences is not None:
        return length // chunk + sequences
    if length <= chunk and not initial:
        return 0
    return batch * ceil_div(length, chunk)
