"""State-space duality: the scan of Mamba-2 as one matrix (arXiv 2405.21060, sections 3 and 5).

    y = M x        M_ij = (C_i . B_j) exp(A (delta_{j+1} + ... + delta_i)) delta_j        j <= i

M is semiseparable: every block that lies on or below the diagonal has no more rank than the state has dimensions. That
is why it may be multiplied in chunks, the diagonal ones as attention is, the others through the state between them.
"""

import torch
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.mechanisms.linear_form import LinearForm


def ssd_matrix(delta: Tensor, A: float | Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M (length, length) of one head.

    Args:
        delta: (length,), the steps.
        A: the head's rate, negative.
        B, C: (length, state).
    """
    k, q = (t[None, :, None, None] for t in (B, C))  # (1, length, 1, 1, state)
    log_decay = (delta * A)[None, :, None, None]
    v = delta.new_zeros(1, len(delta), 1, 1, 1)  # the matrix does not depend on the values
    return LinearForm(v, k, q, torch.exp(log_decay), log_decay, delta[None, :, None]).mixing()[0, 0, 0, 0]


def block_ranks(matrix: Tensor, size: int) -> Tensor:
    """The rank of every block (size, size) of a matrix, (blocks, blocks)."""
    length = len(matrix)
    if size < 1 or length % size != 0:
        raise DataError(f"size must divide the length of the matrix, {length}, got {size}")
    blocks = matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    return torch.linalg.matrix_rank(blocks)


def multiply_in_chunks(delta: Tensor, A: float | Tensor, B: Tensor, C: Tensor, x: Tensor, size: int) -> Tensor:
    """M x (length, channels) without the blocks below the diagonal, as the SSD algorithm does it.

    Within a chunk the matrix itself; between them the state, h = exp(A sum delta) h + sum_j exp(...) delta_j B_j x_j.
    """
    state = x.new_zeros(B.shape[1], x.shape[1])
    kept = []
    for start in range(0, len(delta), size):
        part = slice(start, start + size)
        d, b, c, v = delta[part], B[part], C[part], x[part]
        total = (A * d).cumsum(0)[:, None]
        kept.append(ssd_matrix(d, A, b, c) @ v + torch.exp(total) * (c @ state))
        state = torch.exp(total[-1]) * state + (torch.exp(total[-1] - total) * d[:, None] * b).mT @ v
    return torch.cat(kept) if kept else torch.zeros_like(x)
