"""A written file at work, held against the layer that it was written from."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.nn.mixers import MIXERS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mambakit.export import onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="the [onnx] extra is not installed")
pytest.importorskip("onnxscript", reason="the [onnx] extra is not installed")

# The hybrid stands for an attention, an S4D and a Backbone as well.
EXPORTED = ["mamba", "mamba2", "mamba2 without norm", "mamba3 with norm", "mamba3 mimo", "s4d", "hybrid with mlp"]
Written = Callable[[str], tuple[nn.Module, Path]]


def writer(tmp_path_factory: pytest.TempPathFactory, *, step: bool) -> Written:
    """A function that gives a layer of a name, and its file, written once."""

    @cache
    def write(name: str) -> tuple[nn.Module, Path]:
        layer, path = MIXERS[name]().float(), tmp_path_factory.mktemp("onnx") / "layer.onnx"
        onnx(layer, path, step=step)
        return layer, path

    return write


class Session:
    """A file in onnxruntime, and the state that it carries."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(str(path))
        self.inputs = {given.name: given for given in self._session.get_inputs()}
        self._state: dict[str, NDArray[Any]] = {}

    def start(self, batch: int) -> None:
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        sizes = {"batch": batch, "past": 0}
        for name, given in self.inputs.items():
            if name != "x":
                shape = [sizes[size] if isinstance(size, str) else size for size in given.shape]
                self._state[name] = np.zeros(shape, kinds[given.type])

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y, *after = self._session.run(None, {"x": x.numpy(), **self._state})
        self._state = dict(zip(self._state, after, strict=False))
        return torch.from_numpy(y), [torch.from_numpy(part) for part in after]


def assert_same(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, Any]) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
