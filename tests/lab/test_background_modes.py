"""Three modes of one system, four orders of one scan, and the matrix of SSD: all equal, each counted."""

import math

import pytest
import torch

from mambakit import ops
from mambakit.errors import DataError
from mambakit.lab.background import (
    METHODS,
    SCANS,
    MassOnSpring,
    blelloch,
    block_ranks,
    chunked,
    convolve,
    dense_kernel,
    discretise,
    hillis_steele,
    modes_kernel,
    multiply_in_chunks,
    recur,
    sequential,
    ssd_matrix,
)
from mambakit.nn import initial_modes


@pytest.mark.parametrize("method", METHODS)
def test_recurrence_and_convolution_of_a_dense_system_are_one(method: str) -> None:
    system = MassOnSpring().system()
    Ab, Bb = discretise(system.A, system.B, 0.1, method)
    u = torch.randn(80, dtype=torch.float64)
    y = recur(Ab, Bb, system.C, u)
    torch.testing.assert_close(convolve(u, dense_kernel(Ab, Bb, system.C, 80)), y, rtol=0, atol=1e-12)
    # and the scan, in the basis of the eigenvectors
    values, vectors = torch.linalg.eig(Ab)
    entering = u[:, None] * torch.linalg.solve(vectors, Bb.to(vectors))
    h = blelloch(values.expand(80, -1), entering).h
    torch.testing.assert_close((h @ (system.C.to(vectors) @ vectors)).real, y, rtol=0, atol=1e-11)


def test_the_held_kernel_is_the_dense_exponential() -> None:
    """With zero-order hold K_l is C exp(l dt A) times what one held step leaves."""
    system = MassOnSpring().system()
    Ab, Bb = discretise(system.A, system.B, 0.1, "zoh")
    times = 0.1 * torch.arange(30, dtype=torch.float64)
    expected = system.free(times, Bb) @ system.C
    torch.testing.assert_close(dense_kernel(Ab, Bb, system.C, 30), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("init", ["lin", "legs"])
def test_recurrence_and_convolution_of_a_diagonal_system_are_one(init: str) -> None:
    A, B = initial_modes(init, 16)
    C = torch.randn(8, dtype=torch.complex128)
    u = torch.randn(60, dtype=torch.float64)
    by_kernel = convolve(u, modes_kernel(A, B, C, 0.05, 60))
    torch.testing.assert_close(recur(*discretise(A, B, 0.05, "zoh"), C, u), by_kernel, rtol=0, atol=1e-11)
    direct = torch.stack([(modes_kernel(A, B, C, 0.05, 60)[: t + 1].flip(0) * u[: t + 1]).sum() for t in range(60)])
    torch.testing.assert_close(by_kernel, direct, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64, 100, 129])
def test_every_scan_gives_the_recurrence(name: str, length: int) -> None:
    a, b = torch.rand(length, 3, dtype=torch.float64), torch.randn(length, 3, dtype=torch.float64)
    h, expected = torch.zeros(3, dtype=torch.float64), []
    for t in range(length):
        h = a[t] * h + b[t]
        expected.append(h)
    torch.testing.assert_close(SCANS[name](a, b).h, torch.stack(expected), rtol=0, atol=1e-12)


def test_scans_pass_decays_of_zero_and_are_the_selective_scan() -> None:
    u, delta = torch.randn(1, 50, 2, dtype=torch.float64), torch.rand(1, 50, 2, dtype=torch.float64)
    A, B, C = -torch.rand(2, 3).double(), torch.randn(1, 50, 3).double(), torch.randn(1, 50, 3).double()
    expected = ops.selective_scan(u, delta, A, B, C)
    a = torch.exp(delta[0, :, :, None] * A)
    b = (delta * u)[0, :, :, None] * B[0, :, None]
    for scan in SCANS.values():
        torch.testing.assert_close((scan(a, b).h * C[0, :, None]).sum(-1), expected[0], rtol=0, atol=1e-12)
    a[20] = 0.0
    for scan in SCANS.values():
        torch.testing.assert_close(scan(a, b).h[20], b[20], rtol=0, atol=0)


@pytest.mark.parametrize("length", [2, 8, 64, 256])
def test_counts_are_those_of_the_closed_forms(length: int) -> None:
    a, b = torch.rand(length), torch.rand(length)
    rounds = int(math.log2(length))
    counts = {scan.__name__: scan(a, b) for scan in (sequential, hillis_steele, blelloch)}
    found = {name: (scan.combinations, scan.depth) for name, scan in counts.items()}
    assert found == {
        "sequential": (length - 1, length - 1),
        "hillis_steele": (rounds * length - length + 1, rounds),
        "blelloch": (3 * length - rounds - 3, 2 * rounds),
    }
    for size in (2, length // 2, length):
        scan = chunked(a, b, size)
        chunks = length // size
        assert scan.combinations == 2 * length - size - chunks
        assert scan.depth == size + chunks - 2 + (chunks > 1 and size > 1)


def test_the_matrix_of_ssd_is_its_scan() -> None:
    delta, x = torch.rand(32).double(), torch.randn(32, 5).double()
    B, C = torch.randn(2, 32, 4, dtype=torch.float64).unbind()
    M = ssd_matrix(delta, -0.7, B, C)
    rate = torch.tensor([-0.7], dtype=torch.float64)
    expected = ops.ssd(x[None, :, None], delta[None, :, None], rate, B[None], C[None])[0, :, 0]
    torch.testing.assert_close(M @ x, expected, rtol=0, atol=1e-12)
    for size in (1, 5, 8, 32, 100):
        torch.testing.assert_close(multiply_in_chunks(delta, -0.7, B, C, x, size), expected, rtol=0, atol=1e-12)


def test_blocks_below_the_diagonal_have_the_rank_of_the_state() -> None:
    B, C = torch.randn(2, 32, 3, dtype=torch.float64).unbind()
    ranks = block_ranks(ssd_matrix(torch.rand(32).double(), -0.3, B, C), 8)
    assert (ranks.diagonal() == 8).all()
    below = torch.ones(4, 4).tril(-1).bool()
    assert (ranks[below] == 3).all()
    assert (ranks[below.mT] == 0).all()


def test_what_is_no_recurrence_is_refused() -> None:
    with pytest.raises(DataError, match="a and b must be"):
        sequential(torch.ones(3), torch.ones(4))
    with pytest.raises(DataError, match="size must be at least 1"):
        chunked(torch.ones(3), torch.ones(3), 0)
    with pytest.raises(DataError, match="size must divide"):
        block_ranks(torch.eye(4), 3)
    with pytest.raises(DataError, match="K must be as long as u"):
        convolve(torch.ones(4), torch.ones(5))
