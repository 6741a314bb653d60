"""What a run does with the model, and what its record says."""

import copy

import pydantic
import pytest
import torch
from tests.training.toy import ToyData, squared_error, toy_model, training_data, validation_data
from torch import nn

from mambakit.errors import DataError, MambakitError
from mambakit.training import TrainingConfig, copy_weights, fit

CONFIG = TrainingConfig(epochs=6, batch_size=8, learning_rate=0.05, patience=None)


def run(model=None, objective=squared_error, training=None, validation=None, **settings):
    model = model or toy_model()
    config = CONFIG.model_copy(update=settings)
    record = fit(
        model,
        objective,
        training_data() if training is None else training,
        validation_data() if validation is None else validation,
        config,
        quiet=True,
    )
    return model, record


def validation_loss(model):
    data = validation_data()
    with torch.no_grad():
        return float(squared_error(model, data.batch(torch.arange(len(data))))[0])


def equal_weights(model, other):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


class Scripted(nn.Module):
    """A model whose validation losses are given; its one weight counts the steps of training."""

    def __init__(self, losses):
        super().__init__()
        self.losses = iter(losses)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def objective(self, model, batch):
        if self.training:
            return -self.weight.sum(), {}
        return torch.tensor(next(self.losses), dtype=torch.float64), {}


def run_scripted(losses, **settings):
    model = Scripted(losses)
    one_batch = ToyData(8, seed=0)
    settings = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": 1.0, **settings}
    _, record = run(model, model.objective, one_batch, one_batch, **settings)
    return float(model.weight.detach()), record


def test_training_lowers_the_validation_loss():
    model, record = run()
    assert validation_loss(model) < 0.5 * record.history[0]["validation_loss"]


def test_two_runs_with_one_seed_end_with_the_same_bits():
    assert equal_weights(run(toy_model(dropout=0.3))[0], run(toy_model(dropout=0.3))[0])


def test_another_seed_takes_another_way():
    assert not equal_weights(run(seed=0)[0], run(seed=1)[0])


def test_cutting_a_batch_for_memory_changes_nothing_but_rounding():
    whole, record = run(clip_norm=0.1)
    parts, record_of_parts = run(clip_norm=0.1, gradient_accumulation=3)
    for weight, weight_of_parts in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(weight_of_parts, weight, rtol=1e-9, atol=1e-12)
    assert record_of_parts.history[-1]["train_loss"] == pytest.approx(record.history[-1]["train_loss"], rel=1e-9)


def test_the_model_ends_in_eval_mode_with_the_weights_of_the_best_epoch():
    weight, record = run_scripted([5.0, 4.0, 1.0, 2.0, 3.0, 2.0, 2.0])
    assert (record.best_epoch, record.best_validation_loss) == (2, 1.0)
    assert weight == pytest.approx(2.0, rel=1e-6), "two epochs of one step of size 1"
    model, record = run()
    assert not model.training
    assert validation_loss(model) == pytest.approx(record.best_validation_loss, rel=1e-12)


def test_a_model_that_is_best_untrained_stays_untrained():
    weight, record = run_scripted([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert record.best_epoch == 0
    assert weight == 0.0


def test_a_run_stops_when_its_patience_is_used_up():
    _, record = run_scripted([5.0, 4.0, 4.5, 4.0, 3.0, 3.0, 3.0], patience=2)
    assert [entry["epoch"] for entry in record.history] == [0, 1, 2, 3]
    assert record.stopped_early


def test_an_improvement_renews_the_patience():
    _, record = run_scripted([5.0, 4.0, 4.5, 3.0, 3.5, 2.0, 2.0], patience=2)
    assert record.history[-1]["epoch"] == 6
    assert not record.stopped_early


def test_improvements_below_min_delta_use_up_patience_but_count_as_best():
    _, record = run_scripted([5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4], patience=2, min_delta=0.5)
    assert record.history[-1]["epoch"] == 2
    assert record.best_validation_loss == 4.8


def test_epoch_zero_tells_of_validation_only():
    _, record = run()
    assert sorted(record.history[0]) == ["epoch", "seconds", "validation_absolute_error", "validation_loss"]
    assert sorted(record.history[1]) == [
        "epoch",
        "gradient_norm",
        "learning_rate",
        "seconds",
        "train_absolute_error",
        "train_loss",
        "validation_absolute_error",
        "validation_loss",
    ]


def test_the_record_counts_parameters_and_seconds():
    model = toy_model()
    model[0].bias.requires_grad_(False)
    _, record = run(model)
    assert record.parameters == 4 * 8 + 8 + 1
    assert record.seconds == pytest.approx(sum(entry["seconds"] for entry in record.history))


def test_a_loss_is_the_mean_over_samples_and_not_over_batches():
    model = toy_model()
    expected = validation_loss(model)
    _, record = run(model, batch_size=4)  # nine samples: batches of 4, 4 and 1
    assert record.history[0]["validation_loss"] == pytest.approx(expected, rel=1e-12)


def test_the_gradient_is_clipped_after_its_norm_is_noted():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    def objective(model, batch):
        return 30 * model.weight[0] + 40 * model.weight[1], {}

    model, record = run(Slope(), objective, epochs=1, clip_norm=5.0)
    assert record.history[1]["gradient_norm"] == pytest.approx(50.0)
    assert model.weight.grad.norm() == pytest.approx(5.0)


def test_epochs_are_announced_in_order():
    announced = []
    options = {"quiet": True, "on_epoch": announced.append}
    fit(toy_model(), squared_error, training_data(), validation_data(), CONFIG, **options)
    assert [entry["epoch"] for entry in announced] == list(range(7))


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []


def test_mixed_precision_leaves_no_trace_on_the_model():
    model, _ = run(mixed_precision="bf16")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    data = validation_data().batch(torch.arange(3))["x"]
    assert twin(data).abs().sum() > 0, "the copy calls its own forward"
    assert twin(data).dtype == torch.float64


def test_runs_of_different_precision_follow_each_other_in_one_process():
    def in_float32(model, batch):
        return squared_error(model, {name: tensor.float() for name, tensor in batch.items()})

    def weights_after(precision):
        return copy_weights(run(toy_model().float(), in_float32, mixed_precision=precision)[0])

    full, half, full_again = weights_after("no"), weights_after("bf16"), weights_after("no")
    assert all(torch.equal(full[name], full_again[name]) for name in full)
    assert any(not torch.equal(full[name], half[name]) for name in full)


def test_fp16_is_refused_on_the_cpu():
    with pytest.raises(MambakitError, match="'fp16' needs a GPU"):
        run(mixed_precision="fp16")


@pytest.mark.parametrize("which", ["training", "validation"])
def test_empty_data_is_refused_by_name(which):
    with pytest.raises(DataError, match=f"{which}_data is empty"):
        run(**{which: ToyData(0, seed=0)})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("learning_rate", float("nan")), ("clip_norm", 0), ("schedule", "linear"), ("momentum", 0.9)],
)
def test_a_setting_out_of_bounds_is_refused_by_name(setting, value):
    with pytest.raises(pydantic.ValidationError, match=setting):
        TrainingConfig(**{setting: value})
