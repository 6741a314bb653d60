"""Where Mamba comes from, as code: systems in continuous time, discretisation, HiPPO, kernels, scans, SSD.

Everything is in float64 and written to be read; each part has a test by which it equals another way to compute it.

>>> spring = MassOnSpring()
>>> Ab, Bb = discretise(spring.system().A, spring.system().B, dt=0.1, method="zoh")
>>> K = dense_kernel(Ab, Bb, spring.system().C, 100)  # what a push at time 0 does for ten seconds
"""

from mambakit.lab.background.discretise import METHODS, discretise, error_order, simulate
from mambakit.lab.background.hippo import (
    LegsModes,
    diagonalised_legs,
    legs_memory,
    legt,
    legt_memory,
    polynomials,
    projection,
    quadrature,
    reconstruct,
    white_signal,
)
from mambakit.lab.background.kernels import convolve, dense_kernel, modes_kernel, recur
from mambakit.lab.background.scans import SCANS, Scan, blelloch, chunked, hillis_steele, sequential
from mambakit.lab.background.semiseparable import block_ranks, multiply_in_chunks, ssd_matrix
from mambakit.lab.background.systems import LinearSystem, MassOnSpring, matrix_exponential

__all__ = [
    "LinearSystem",
    "MassOnSpring",
    "matrix_exponential",
    "METHODS",
    "discretise",
    "simulate",
    "error_order",
    "diagonalised_legs",
    "LegsModes",
    "legs_memory",
    "legt",
    "legt_memory",
    "polynomials",
    "projection",
    "quadrature",
    "reconstruct",
    "white_signal",
    "dense_kernel",
    "modes_kernel",
    "convolve",
    "recur",
    "SCANS",
    "Scan",
    "sequential",
    "hillis_steele",
    "blelloch",
    "chunked",
    "ssd_matrix",
    "block_ranks",
    "multiply_in_chunks",
]
