"""ONNX files of the sequence form: onnxruntime gives what every mixer gives; and what can't be written."""

from pathlib import Path

import pytest
import torch
from tests.export.session import EXPORTED, Session, Written, assert_same, writer
from tests.nn.mixers import MIXERS, WIDTH
from torch import nn

from mambakit.export import onnx
from mambakit.nn import Bidirectional, Mamba, Mamba2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory, step=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_sequence_of_any_length_and_batch_gives_what_the_layer_gives(name: str, written: Written) -> None:
    layer, path = written(name)
    session = Session(path)
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


def test_inputs_and_axes_are_named(written: Written) -> None:
    assert Session(written("mamba")[1]).inputs["x"].shape == ["batch", "length", 8]


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
