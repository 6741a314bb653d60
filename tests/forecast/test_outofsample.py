"""The record of what was forecast and what came: joined, written, read back, and refused where it does not fit."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.outofsample import OutOfSample, read_records, stacked, write_records
from mambakit.forecast.predictions import Predictions, normal_predictions


def record(symbol: str = "X", samples: int = 4, first: int = 0, fold: int = 0, extra: bool = True) -> OutOfSample:
    generator = np.random.default_rng(first + len(symbol))
    predictions = {
        name: normal_predictions(generator.normal(size=(samples, 2)), generator.uniform(1, 2, (samples, 2)))
        for name in ("mamba", "drift", *(["garch walk"] if extra else []))
    }
    return OutOfSample(
        symbol,
        (1, 5),
        np.arange(first, first + samples).astype("datetime64[D]"),
        np.full(samples, fold),
        generator.normal(size=(samples, 2)),
        generator.uniform(1, 2, samples),
        generator.uniform(1, 2, (samples, 2)),
        predictions,
    )


def assert_same(one: OutOfSample, other: OutOfSample) -> None:
    assert (one.symbol, one.horizons, list(one.predictions)) == (other.symbol, other.horizons, list(other.predictions))
    for field in ("dates", "fold", "actual", "volatility", "usual_change"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    for name in one.predictions:
        np.testing.assert_array_equal(one.predictions[name].mean, other.predictions[name].mean)
        np.testing.assert_allclose(one.predictions[name].quantiles, other.predictions[name].quantiles, rtol=1e-6)


def test_records_survive_parquet(tmp_path: Path) -> None:
    records = [record("AAPL"), record("IBM", samples=3, first=9)]
    write_records(tmp_path / "p.parquet", records)
    for written, read in zip(records, read_records(tmp_path / "p.parquet"), strict=True):
        assert_same(written, read)


def test_the_table_is_tidy() -> None:
    table = record().to_table()
    assert table.num_rows == 4 * 2 * 3  # samples, horizons, forecasters
    assert {"symbol", "forecaster", "origin", "horizon", "actual", "mean", "q0.5"} <= set(table.column_names)


def test_folds_stack_in_time_with_what_every_fold_has() -> None:
    parts = [record(), record(first=4, fold=1, extra=False)]
    whole = stacked(parts)
    assert whole.fold.tolist() == [0] * 4 + [1] * 4
    assert list(whole.predictions) == ["mamba", "drift"]
    np.testing.assert_array_equal(whole.predictions["drift"].mean[4:], parts[1].predictions["drift"].mean)


def test_the_scale_grows_with_the_square_root_of_the_horizon() -> None:
    one = record()
    np.testing.assert_allclose(one.scale[:, 1], np.sqrt(5) * one.volatility)


def test_predictions_of_another_number_of_samples_are_refused_by_name() -> None:
    other = Predictions(np.zeros((3, 2)), np.zeros((3, 2, 21)))
    with pytest.raises(DataError, match=r"X: ridge must predict \(4, 2\), got \(3, 2\)"):
        record().with_predictions("ridge", other)


def test_a_file_that_is_not_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet", "missing.parquet"):
        with pytest.raises(ArtefactError, match=name):
            read_records(tmp_path / name)
