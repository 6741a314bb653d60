"""A prepared series: what each part may know of the others, and that batches are the windows they should be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mambakit.errors import DataError
from mambakit.forecast.dataset import minimum_days, prepare_series, raw_features
from mambakit.forecast.samples import SequenceData
from mambakit.forecast.windows import SequenceGenerator, Split


def test_a_batch_gathers_the_windows_of_the_sequence_generator(prepared, window_config) -> None:
    prepared = replace(prepared, config=window_config)
    X, y = SequenceGenerator(60, (1, 5, 10, 30)).generate_sequences(
        prepared.features.astype(np.float64), prepared.series.prices
    )
    samples = prepared.split.validation
    batch = prepared.part(samples).batch(torch.tensor([3, 0, 7]))
    np.testing.assert_array_equal(batch["features"], X[samples[[3, 0, 7]]].astype(np.float32))
    for column, horizon in enumerate((1, 5, 10, 30)):
        np.testing.assert_allclose(batch["returns"][:, column], y[horizon][samples[[3, 0, 7]], 0], rtol=1e-6)
    np.testing.assert_array_equal(
        batch["volatility"], prepared.volatility[prepared.origins[samples[[3, 0, 7]]]].astype(np.float32)
    )


def test_the_scaler_knows_the_training_part_alone(prepared, small_config) -> None:
    last_known = prepared.origins[prepared.split.training[-1]]
    other = prepared.series.prices.copy()
    other[last_known + 1 :] *= np.exp(np.linspace(0, 3, len(other) - last_known - 1))
    changed = prepare_series(replace(prepared.series, prices=other), small_config)
    np.testing.assert_array_equal(changed.scaler.mean, prepared.scaler.mean)
    np.testing.assert_array_equal(changed.scaler.deviation, prepared.scaler.deviation)


def test_the_scaler_knows_all_of_the_training_part(prepared, small_config) -> None:
    other = prepared.series.prices.copy()
    other[prepared.origins[prepared.split.training[-1]]] *= 1.05
    changed = prepare_series(replace(prepared.series, prices=other), small_config)
    assert (changed.scaler.mean != prepared.scaler.mean).any()


def test_no_training_target_reaches_a_validation_origin_nor_a_validation_target_a_test_origin(prepared) -> None:
    split, origins = prepared.split, prepared.origins
    assert origins[split.training[-1]] + 30 < origins[split.validation[0]]
    assert origins[split.validation[-1]] + 30 < origins[split.test[0]]
    assert split.test[-1] == len(origins) - 1


def test_minimum_days_is_the_least_that_can_be_split(make_series, small_config) -> None:
    days = minimum_days(small_config)
    split = prepare_series(make_series(days), small_config).split
    assert len(split.training) >= 100
    assert len(split.validation) >= 20
    assert len(split.test) >= 50
    with pytest.raises(DataError, match=f"WALK: {days - 1} days of prices are too few, at least {days} are needed"):
        prepare_series(make_series(days - 1), small_config)


@pytest.mark.parametrize(("value", "words"), [(np.inf, "infinite"), (0.0, "not positive"), (-1.0, "not positive")])
def test_impossible_prices_are_refused(make_series, small_config, value: float, words: str) -> None:
    series = make_series()
    series.prices[123] = value
    with pytest.raises(DataError, match=words):
        prepare_series(series, small_config)


def test_days_without_a_price_are_left_out_and_counted(make_series, small_config) -> None:
    series = make_series()
    series.prices[123] = np.nan
    with pytest.warns(UserWarning, match="WALK: 1 of 460 days have no price and are left out"):
        prepared = prepare_series(series, small_config)
    assert series.dates[123] not in prepared.series.dates
    assert len(prepared.series) == 459


def test_volume_is_a_feature_only_where_it_is_asked_for(make_series, small_config) -> None:
    series = make_series()
    louder = replace(series, volumes=series.volumes * np.linspace(1, 9, len(series)))
    with_volume = small_config.model_copy(update={"include_volume": True})
    np.testing.assert_array_equal(raw_features(series, small_config), raw_features(louder, small_config))
    assert not np.allclose(raw_features(series, with_volume), raw_features(louder, with_volume), equal_nan=True)


def test_a_given_split_decides_what_the_scaler_sees(prepared, small_config) -> None:
    split = Split(np.arange(120), np.arange(150, 190), np.arange(220, 260))
    fold = prepare_series(prepared.series, small_config, split=split)
    first, last = prepared.origins[0] - small_config.sequence_length + 1, prepared.origins[119]
    raw = raw_features(prepared.series, small_config)[first : last + 1]
    np.testing.assert_allclose(fold.scaler.mean, raw.mean(axis=0))
    assert fold.split is split


@pytest.mark.parametrize(
    ("training", "validation", "test", "words"),
    [
        (range(120), range(149, 190), range(220, 260), "training part reach into the validation part"),
        (range(120), range(150, 190), range(219, 260), "validation part reach into the test part"),
        (range(120), range(150, 190), range(220, 9999), "test part must name samples from 0"),
        (range(120), range(0), range(220, 260), "validation part is empty"),
        (range(119, -1, -1), range(150, 190), range(220, 260), "training part must increase"),
    ],
)
def test_a_split_that_leaks_or_does_not_exist_is_refused(
    prepared, small_config, training: range, validation: range, test: range, words: str
) -> None:
    split = Split(np.array(training, dtype=int), np.array(validation, dtype=int), np.array(test, dtype=int))
    with pytest.raises(DataError, match=words):
        prepare_series(prepared.series, small_config, split=split)


def test_every_day_up_to_the_last_training_origin_is_learnt_from_once(prepared) -> None:
    runs = prepared.training_part().sequences
    last = prepared.origins[prepared.split.training[-1]]
    days = torch.cat([run.features for run in runs])
    np.testing.assert_array_equal(days, prepared.features[prepared.first_row : last + 1])
    assert all(run.counted.all() for run in runs)
    logs = np.log(prepared.series.prices)
    expected = logs[prepared.first_row + 5 : last + 6] - logs[prepared.first_row : last + 1]
    np.testing.assert_allclose(torch.cat([run.returns for run in runs])[:, 1], expected, atol=1e-6)


def test_a_batch_of_unequal_sequences_is_padded_with_days_that_do_not_count(prepared) -> None:
    whole = prepared.part(prepared.split.validation).sequences[0]
    short = whole.cut(3)[0]
    batch = SequenceData([whole, short]).batch(torch.tensor([1, 0]))
    assert batch["features"].shape[:2] == (2, len(whole))
    assert not batch["counted"][0, len(short) :].any()
    assert torch.equal(batch["features"][0, : len(short)], short.features)
    assert torch.equal(batch["returns"][1], whole.returns)


def test_covariates_are_columns_like_the_others(prepared, small_config) -> None:
    config = small_config.model_copy(update={"covariates": ("month", "index")})
    generator = np.random.default_rng(0)
    given = {"index": generator.normal(3, 2, len(prepared.series)), "month": np.arange(len(prepared.series)) % 12.0}
    with_covariates = prepare_series(prepared.series, config, covariates=given)
    assert with_covariates.scaler.names == (*prepared.scaler.names, "month", "index")
    np.testing.assert_array_equal(with_covariates.features[:, :-2], prepared.features)
    assert with_covariates.scaler.mean[-1] == pytest.approx(3, abs=0.5)
    standardised = (given["index"] - with_covariates.scaler.mean[-1]) / with_covariates.scaler.deviation[-1]
    np.testing.assert_allclose(with_covariates.features[:, -1], standardised, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "reads the covariates month, got none"),
        ({"month": np.zeros(460), "index": np.zeros(460)}, "got month, index"),
        ({"month": np.zeros(459)}, "one number for each of 460 days"),
        ({"month": np.full(460, np.nan)}, "finite|few"),
    ],
)
def test_covariates_that_do_not_fit_are_refused(prepared, small_config, given, words: str) -> None:
    config = small_config.model_copy(update={"covariates": ("month",)})
    with pytest.raises(DataError, match=words):
        prepare_series(prepared.series, config, covariates=given)
