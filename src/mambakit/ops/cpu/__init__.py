"""The compiled backend: calls into `mambakit._native` with DLPack views of the tensors.

`AVAILABLE` says whether the extension was built and loads; `WHY_MISSING` says what stands in the way.
"""

import importlib
from typing import Any

from torch import Tensor

from mambakit.ops.packing import sequence_bounds

native: Any = None
try:
    native = importlib.import_module("mambakit._native")
    AVAILABLE, WHY_MISSING = True, ""
except ImportError as error:
    AVAILABLE, WHY_MISSING = False, f"mambakit._native does not import: {error}"


def rows(tensor: Tensor | None) -> Tensor | None:
    """`tensor` as the kernels read it: outside the graph, its last axis contiguous (copied only when it is not)."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def whole(tensor: Tensor | None) -> Tensor | None:
    """`tensor` outside the graph and contiguous."""
    return None if tensor is None else tensor.detach().contiguous()


def pack_bounds(rows: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """The bounds of the sequences packed in `rows` (1, length, ...); empty for a batch."""
    return [] if cu_seqlens is None else sequence_bounds(rows.shape[0], rows.shape[1], cu_seqlens)
