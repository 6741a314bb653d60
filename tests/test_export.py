"""ONNX files: onnxruntime reproduces the step form and the sequence form of every mixer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.nn.mixers import MIXERS, WIDTH
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mambakit.export import onnx
from mambakit.nn import Bidirectional, Mamba, Mamba2

onnxruntime = pytest.importorskip("onnxruntime", reason="the [onnx] extra is not installed")
pytest.importorskip("onnxscript", reason="the [onnx] extra is not installed")

# The hybrid stands for an attention, an S4D and a Backbone as well.
EXPORTED = ["mamba", "mamba2", "mamba2 without norm", "mamba3 with norm", "mamba3 mimo", "s4d", "hybrid with mlp"]


@pytest.fixture(params=EXPORTED)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return MIXERS[request.param]().float()


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


@pytest.mark.slow
def test_many_steps_give_what_the_sequence_gives(layer: nn.Module, tmp_path: Path) -> None:
    onnx(layer, tmp_path / "step.onnx", step=True)
    step, x = Session(tmp_path / "step.onnx"), torch.randn(3, 30, WIDTH)
    step.start(batch=3)
    outputs = [step(token) for token in x.unbind(1)]
    with torch.no_grad():
        assert_same((torch.stack([y for y, _ in outputs], dim=1), outputs[-1][1]), layer(x))


@pytest.mark.slow
def test_a_sequence_of_any_length_and_batch_gives_what_the_layer_gives(layer: nn.Module, tmp_path: Path) -> None:
    onnx(layer, tmp_path / "sequence.onnx")
    session = Session(tmp_path / "sequence.onnx")
    for batch, length in ((1, 37), (4, 1)):
        x = torch.randn(batch, length, WIDTH)
        with torch.no_grad():
            assert_same(session(x), layer(x))


@pytest.mark.slow
def test_a_sequence_carries_on_from_its_state(tmp_path: Path) -> None:
    layer = MIXERS["hybrid with mlp"]().float()
    onnx(layer, tmp_path / "sequence.onnx", initial_state=True)
    session, x = Session(tmp_path / "sequence.onnx"), torch.randn(2, 23, WIDTH)
    session.start(batch=2)
    chunks = [session(chunk) for chunk in x.split([4, 1, 18], dim=1)]
    with torch.no_grad():
        assert_same((torch.cat([y for y, _ in chunks], dim=1), chunks[-1][1]), layer(x))


def test_inputs_and_axes_are_named(tmp_path: Path) -> None:
    onnx(Mamba(WIDTH, d_state=3), tmp_path / "step.onnx", step=True)
    shapes = {name: given.shape for name, given in Session(tmp_path / "step.onnx").inputs.items()}
    assert shapes == {"x": ["batch", 8], "state.conv": ["batch", 3, 16], "state.ssm": ["batch", 16, 3]}
    onnx(Mamba(WIDTH, d_state=3), tmp_path / "sequence.onnx")
    assert Session(tmp_path / "sequence.onnx").inputs["x"].shape == ["batch", "length", 8]


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    layer = MIXERS["s4d"]().float()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    onnx(layer, tmp_path / "step.onnx", step=True)
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_what_has_no_state_is_written_as_a_sequence_alone(tmp_path: Path) -> None:
    both = Bidirectional(Mamba2(8, d_state=3, headdim=8), Mamba2(8, d_state=3, headdim=8))
    with pytest.raises(ValueError, match="no state to carry on from"):
        onnx(both, tmp_path / "step.onnx", step=True)
    onnx(both, tmp_path / "sequence.onnx")
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "sequence.onnx")(x)[0], both(x)[0], rtol=1e-4, atol=1e-4)


def test_what_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "refused.onnx"
    with pytest.raises(TypeError, match=r"model must be a Backbone, .* got Linear"):
        onnx(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match=r"must be float32, got torch.float64: export model.float\(\)"):
        onnx(MIXERS["mamba"](), path)
    monkeypatch.setenv("MAMBAKIT_BACKEND", "reference")
    with pytest.raises(ValueError, match="MAMBAKIT_BACKEND=reference can't be exported"):
        onnx(Mamba(8), path)
    assert not path.exists()
