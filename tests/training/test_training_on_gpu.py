"""Mixed precision on a GPU, with the gradient scaler that only fp16 has."""

import warnings

import pytest
import torch
from tests.training.toy import squared_error, toy_model, training_data, validation_data

from mambakit.errors import TrainingDiverged
from mambakit.training import TrainingConfig, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Interrupted(Exception):
    pass


def in_float32(model, batch):
    return squared_error(model, {name: tensor.float() for name, tensor in batch.items()})


def run(precision, objective=in_float32, **options):
    # 24 steps: more than the 16 halvings that take fp16's scale from 65536 to 1.
    config = TrainingConfig(epochs=8, batch_size=8, learning_rate=0.05, patience=None, mixed_precision=precision)
    model = toy_model(dropout=0.1).float()
    options = {"quiet": True, **options}
    return model, fit(model, objective, training_data(), validation_data(), config, **options)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_learns(precision):
    model, record = run(precision)
    assert next(model.parameters()).is_cuda
    assert record.best_validation_loss < 0.5 * record.history[0]["validation_loss"]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_captured_steps_are_plain_steps_dropout_and_all(precision):
    _, plain = run(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a step could not be captured
        _, captured = run(precision, capture=True)
    for entry, captured_entry in zip(plain.history, captured.history, strict=True):
        assert captured_entry["validation_loss"] == pytest.approx(entry["validation_loss"], rel=1e-3)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_interrupted_run_resumes_to_the_same_losses(precision, capture, tmp_path):
    def stop(entry):
        if entry["epoch"] == 3:
            raise Interrupted

    _, whole = run(precision, capture=capture)
    with pytest.raises(Interrupted):
        run(precision, run_dir=tmp_path, on_epoch=stop, capture=capture)
    _, resumed = run(precision, run_dir=tmp_path, resume=True, capture=capture)
    for entry, resumed_entry in zip(whole.history, resumed.history, strict=True):
        assert resumed_entry["validation_loss"] == pytest.approx(entry["validation_loss"], rel=1e-3)


def test_an_overflow_that_scaling_causes_is_survived_and_a_lasting_one_is_not():
    def steep(factor):
        def objective(model, batch):
            loss, metrics = in_float32(model, batch)
            return loss * (factor if model[0].training else 1.0), metrics

        return objective

    # Scaled by 65536 at first, gradients around 100 overflow fp16; scaled by less they do not.
    assert run("fp16", steep(100.0))[1].history[-1]["epoch"] > 0
    with pytest.raises(TrainingDiverged, match="gradient is not finite"):
        run("fp16", steep(1e30))
