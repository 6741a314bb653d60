"""Which backends the tests of the operations run over, and where their tensors lie.

With a GPU all tensors of these tests are made on it; MAMBAKIT_TEST_DEVICE=cpu keeps them on the CPU. Without one, the
GPU's kernels run on the CPU in Triton's interpreter.
"""

import os

import torch

from mambakit.ops import triton

DEVICE = os.environ.get("MAMBAKIT_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
TRITON = ["triton"] if triton.refusal(torch.device(DEVICE)) is None else []
"""The GPU's kernels, where they can run: on a GPU, or in the interpreter."""

BACKENDS = (["cpu"] if DEVICE == "cpu" else []) + ["portable"]
"""The backends that every operation has."""
