"""The long-horizon forecaster: its closed form, where it starts, what it may see, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.etth1 import read_etth1
from pydantic import ValidationError

from mambakit.errors import DataError
from mambakit.forecast.long_horizon import (
    LONG_HORIZON_TRAINING,
    LongHorizonConfig,
    LongHorizonModel,
    SeriesWindows,
    believable_share,
    mean_errors,
    solve_ridge,
    train_long_horizon,
)
from mambakit.training import TrainingConfig

LOOKBACK, HORIZON = 24, 6
SMALL = LongHorizonConfig(
    lookback=LOOKBACK,
    horizon=HORIZON,
    patch=8,
    stride=4,
    d_model=8,
    num_layers=1,
    mixer="mamba",
    mixer_options={"d_state": 4},
)
BRIEF = TrainingConfig.model_validate({**LONG_HORIZON_TRAINING.model_dump(), "epochs": 2, "batch_size": 32})


def waves(steps: int = 400, noise: float = 0.0) -> np.ndarray:
    """Two channels (steps, 2) of period 12 around levels of their own: what a linear map forecasts exactly."""
    time = np.arange(steps)
    generator = np.random.default_rng(0)
    clean = np.stack([3 + np.sin(time * np.pi / 6), -1 + np.cos(time * np.pi / 6)], axis=1)
    return clean + noise * generator.standard_normal(clean.shape)


def test_ridge_forecasts_what_repeats_itself() -> None:
    values = waves()
    model = LongHorizonModel(SMALL)
    known, unseen, test = (
        SeriesWindows(values, LOOKBACK, HORIZON, *part) for part in ((0, 200), (200, 300), (300, 400))
    )
    assert solve_ridge(model, known, unseen) == 10.0  # the smallest penalty, where nothing is noise
    squared, absolute = mean_errors(model, test)
    assert squared < 1e-4
    assert absolute < 1e-2


def test_training_starts_from_the_ridge_and_never_ends_worse_on_validation() -> None:
    values = waves(noise=0.3)
    result = train_long_horizon(values, 250, 330, SMALL, BRIEF, quiet=True)
    alone = LongHorizonModel(SMALL)
    known, unseen = (SeriesWindows(values, LOOKBACK, HORIZON, *part) for part in ((0, 250), (250, 330)))
    assert solve_ridge(alone, known, unseen) == result.penalty
    start = result.record.history[0]["validation_loss"]
    assert start == pytest.approx(mean_errors(alone, unseen)[0], rel=1e-4)
    assert result.record.best_validation_loss <= start


def test_a_sure_correction_is_believed_and_a_chance_one_is_not() -> None:
    generator = np.random.default_rng(0)
    correction = generator.standard_normal(600)
    noise = generator.standard_normal(600)
    assert believable_share(correction * (0.8 * correction + 0.1 * noise), correction**2, 10) == pytest.approx(
        0.8, abs=0.05
    )
    chances = []
    for _ in range(200):
        correction, noise = generator.standard_normal((2, 60))
        chances.append(believable_share(correction * noise, correction**2, 20))
    assert np.mean(np.array(chances) == 0) > 0.75  # three blocks: one in six passes one standard error
    assert believable_share(np.zeros(10), np.zeros(10), 2) == 0
    assert believable_share(np.ones(3), np.ones(3), 2) == 0  # one block says nothing about chance


def test_mamba_alone_learns_what_the_level_misses() -> None:
    config = SMALL.model_copy(update={"linear": False, "dropout": 0.0})
    training = TrainingConfig.model_validate({**BRIEF.model_dump(), "epochs": 20, "learning_rate": 1e-2})
    result = train_long_horizon(waves(), 250, 330, config, training, quiet=True)
    assert result.penalty is None
    assert result.record.best_validation_loss < 0.2 * result.record.history[0]["validation_loss"]


def test_targets_of_a_part_lie_within_it_and_cover_it() -> None:
    values = np.arange(100.0)[:, None]
    windows = SeriesWindows(values, LOOKBACK, HORIZON, 50, 80)
    x, y = windows.batch(torch.arange(len(windows)))
    assert y.min() == 50
    assert y.max() == 79
    assert torch.equal(x[:, -1] + 1, y[:, 0])
    assert len(windows) == 30 - HORIZON + 1


def test_nothing_after_the_validation_part_is_read() -> None:
    values = waves(noise=0.3)
    known = train_long_horizon(values, 250, 330, SMALL, BRIEF, quiet=True)
    values[330:] = np.nan
    again = train_long_horizon(values, 250, 330, SMALL, BRIEF, quiet=True)
    for first, second in zip(known.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_a_shift_and_a_stretch_of_a_channel_pass_through() -> None:
    model = LongHorizonModel(SMALL)
    torch.nn.init.normal_(model.head.weight)
    model.linear.normal_()
    x = torch.randn(3, LOOKBACK, 2)
    y = model.eval()(x)
    # The scale has a small constant added, so that a window that stands still divides nothing by zero.
    torch.testing.assert_close(model(5 * x + 7), 5 * y + 7, rtol=1e-2, atol=1e-1)
    assert model(torch.ones(1, LOOKBACK, 1)).isfinite().all()


def test_series_without_a_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"steps 0 to 29 are too few for a window of 24 steps and a horizon of 6"):
        SeriesWindows(waves(), LOOKBACK, HORIZON, 0, 29)


def test_missing_values_are_refused() -> None:
    values = waves()
    values[10] = np.nan
    with pytest.raises(DataError, match="finite"):
        train_long_horizon(values, 250, 330, SMALL, BRIEF, quiet=True)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="a patch of 32 steps does not fit into a lookback of 16"):
        LongHorizonConfig(lookback=16)
    with pytest.raises(ValidationError, match="mixer must be one of"):
        LongHorizonConfig(mixer="lstm")


def test_etth1_is_told_from_another_file(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("date,OT\n2016-07-01,30.5\n")
    with pytest.raises(DataError, match=r"expected a date, 7 channels and 14400 hours or more, got shape \(1, 2\)"):
        read_etth1(path)
    with pytest.raises(DataError, match="expected ETTh1"):
        read_etth1(tmp_path / "missing.csv")
