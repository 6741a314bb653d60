"""ONNX files of the step form: onnxruntime carries the state of every mixer."""

from pathlib import Path

import pytest
import torch
from tests.export.session import EXPORTED, Session, Written, assert_same, writer
from tests.nn.mixers import MIXERS, WIDTH

from mambakit.export import onnx


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory, step=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_many_steps_give_what_the_sequence_gives(name: str, written: Written) -> None:
    layer, path = written(name)
    step, x = Session(path), torch.randn(3, 30, WIDTH)
    step.start(batch=3)
    outputs = [step(token) for token in x.unbind(1)]
    with torch.no_grad():
        assert_same((torch.stack([y for y, _ in outputs], dim=1), outputs[-1][1]), layer(x))


def test_inputs_and_axes_are_named(written: Written) -> None:
    shapes = {name: given.shape for name, given in Session(written("mamba")[1]).inputs.items()}
    assert shapes == {"x": ["batch", 8], "state.conv": ["batch", 2, 16], "state.ssm": ["batch", 16, 3]}


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    layer = MIXERS["s4d"]().float()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    onnx(layer, tmp_path / "step.onnx", step=True)
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
