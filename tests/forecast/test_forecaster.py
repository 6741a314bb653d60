"""Tidy frames: any kind of frame and series in, forecasts of every step out, and Nixtla's evaluation runs on them."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from utilsforecast.evaluation import evaluate
from utilsforecast.losses import coverage, mae, mase

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast import MambaForecaster
from mambakit.forecast.config import SEQUENCE_TRAINING, MambaConfig

CONFIG = MambaConfig(d_model=8, d_state=4, num_layers=1, windows=(5, 10), sequence_length=20)
QUICK = SEQUENCE_TRAINING.model_copy(update={"epochs": 2})
COLUMNS = ["unique_id", "ds", "MambaForecaster", "MambaForecaster-lo-80", "MambaForecaster-hi-80"]


def forecaster(h: int = 4, **changes) -> MambaForecaster:
    return MambaForecaster(h, **{"config": CONFIG, "training": QUICK} | changes)


def frame(names=("a", "b"), steps: int = 260, seed: int = 0, freq: str = "B") -> pd.DataFrame:
    """Prices that wander, one series a name."""
    generator = np.random.default_rng(seed)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "unique_id": name,
                    "ds": pd.date_range("2015-01-01", periods=steps, freq=freq),
                    "y": 40 * np.exp(0.01 * generator.standard_normal(steps).cumsum()),
                }
            )
            for name in names
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def prices() -> pd.DataFrame:
    return frame()


@pytest.fixture(scope="module")
def fitted(prices: pd.DataFrame) -> MambaForecaster:
    return forecaster().fit(prices)


def test_every_step_ahead_of_every_series_is_forecast(fitted, prices: pd.DataFrame) -> None:
    forecast = fitted.predict(level=[80])
    assert list(forecast.columns) == COLUMNS
    assert forecast["unique_id"].tolist() == ["a"] * 4 + ["b"] * 4
    expected = pd.bdate_range(prices["ds"].max(), periods=5)[1:]
    assert forecast["ds"].tolist() == [*expected, *expected]
    assert (forecast["MambaForecaster-lo-80"] < forecast["MambaForecaster"]).all()
    assert (forecast["MambaForecaster"] < forecast["MambaForecaster-hi-80"]).all()
    last = prices.groupby("unique_id")["y"].last()
    assert (forecast["MambaForecaster"] / forecast["unique_id"].map(last) - 1).abs().max() < 0.1


def test_fewer_steps_are_the_first_of_all(fitted) -> None:
    pd.testing.assert_frame_equal(
        fitted.predict(h=2), fitted.predict().groupby("unique_id").head(2).reset_index(drop=True)
    )


def test_the_order_of_rows_does_not_matter(fitted, prices: pd.DataFrame) -> None:
    shuffled = prices.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(fitted.predict(df=shuffled), fitted.predict())


def test_polars_comes_out_where_polars_goes_in(fitted, prices: pd.DataFrame) -> None:
    forecast = forecaster().fit(pl.from_pandas(prices)).predict(level=[80])
    assert isinstance(forecast, pl.DataFrame)
    pd.testing.assert_frame_equal(forecast.to_pandas(), fitted.predict(level=[80]), check_dtype=False)


def test_utilsforecast_evaluates_the_cross_validation(prices: pd.DataFrame) -> None:
    windows = forecaster(freq="B").cross_validation(prices, n_windows=3, step_size=2, level=[80])
    assert list(windows.columns) == ["unique_id", "ds", "cutoff", "y", *COLUMNS[2:]]
    assert len(windows) == 2 * 3 * 4
    merged = windows.merge(prices, on=["unique_id", "ds"], suffixes=("", "_true"))
    assert (merged["y"] == merged["y_true"]).all()
    scores = evaluate(windows.drop(columns="cutoff"), metrics=[mae, coverage], level=[80])
    assert set(scores["metric"]) == {"mae", "coverage_level80"}
    assert scores["MambaForecaster"].notna().all()
    in_polars = forecaster().cross_validation(pl.from_pandas(prices), n_windows=1)
    assert evaluate(in_polars.drop("cutoff"), metrics=[mae])["MambaForecaster"].is_not_null().all()
    scaled = evaluate(windows.drop(columns="cutoff"), metrics=[partial(mase, seasonality=1)], train_df=prices)
    assert scaled["MambaForecaster"].between(0, 10).all()


def test_windows_of_the_past_end_where_they_should(prices: pd.DataFrame) -> None:
    windows = forecaster().cross_validation(prices, n_windows=3, step_size=2)
    days = prices["ds"].unique()
    assert sorted(windows["cutoff"].unique()) == [days[-9], days[-7], days[-5]]
    last = windows[windows["cutoff"] == days[-5]]
    assert last["ds"].tolist() == [*days[-4:], *days[-4:]]


@pytest.mark.parametrize("refit", [False, True])
def test_a_window_of_the_past_knows_nothing_of_what_came(prices: pd.DataFrame, refit: bool) -> None:
    changed = prices.copy()
    later = changed["ds"] > prices["ds"].unique()[-5]
    changed.loc[later, "y"] *= 3
    ours, theirs = (
        forecaster().cross_validation(each, n_windows=2, step_size=4, refit=refit) for each in (prices, changed)
    )
    pd.testing.assert_series_equal(ours["MambaForecaster"][:4], theirs["MambaForecaster"][:4])
    pd.testing.assert_series_equal(ours["MambaForecaster"][4:8], theirs["MambaForecaster"][4:8])
    assert not ours["y"].equals(theirs["y"])


def test_refitting_learns_from_what_came_meanwhile(prices: pd.DataFrame) -> None:
    once, again = (forecaster().cross_validation(prices, 2, step_size=20, refit=refit) for refit in (False, True))
    assert once["MambaForecaster"][:4].equals(again["MambaForecaster"][:4])
    assert not once["MambaForecaster"][4:8].equals(again["MambaForecaster"][4:8])


def test_values_of_any_sign_are_forecast_in_their_own_unit() -> None:
    values = frame(names=["v"])
    values["y"] = np.random.default_rng(2).standard_normal(260).cumsum() * 7 - 20
    made = forecaster(target="value").fit(values)
    forecast = made.predict(level=[80])
    louder = forecaster(target="value").fit(values.assign(y=values["y"] * 1000 + 5)).predict(level=[80])
    for column in COLUMNS[2:]:
        np.testing.assert_allclose(louder[column], forecast[column] * 1000 + 5, rtol=1e-4)
    width = forecast["MambaForecaster-hi-80"] - forecast["MambaForecaster-lo-80"]
    assert width.is_monotonic_increasing
    assert 2 * 1.28 * 7 * 0.5 < width[0] < 2 * 1.28 * 7 * 2  # steps have a deviation of 7
    with pytest.raises(DataError, match="choose target='value'"):
        forecaster().fit(values)


def test_a_value_that_stands_still_at_first_is_forecast_still() -> None:
    values = frame(names=["v"])
    values["y"] = np.where(np.arange(260) < 200, 3.0, 3.0 + np.arange(260) % 2)
    assert np.isfinite(forecaster(target="value").fit(values).predict()["MambaForecaster"]).all()


@pytest.mark.parametrize(
    ("freq", "given", "expected"),
    [
        ("MS", None, "2036-09-01"),
        ("D", None, "2015-09-18"),
        ("h", "h", "2015-01-11 20:00"),
        ("W-SUN", None, "2019-12-29"),
    ],
)
def test_the_next_step_follows_the_frequency(freq: str, given: str | None, expected: str) -> None:
    forecast = forecaster(freq=given).fit(frame(names=["a"], freq=freq)).predict(h=1)
    assert forecast["ds"].tolist() == [pd.Timestamp(expected)]


def test_business_days_are_inferred_though_holidays_are_missing() -> None:
    gappy = frame(names=["a"]).drop(index=[30, 31, 90]).reset_index(drop=True)
    assert forecaster().fit(gappy).predict(h=1)["ds"].tolist() == [pd.Timestamp("2015-12-31")]


def test_numbers_count_on() -> None:
    numbered = frame(names=["a"]).assign(ds=np.arange(10, 10 + 2 * 260, 2))
    assert forecaster(freq=2).fit(numbered).predict()["ds"].tolist() == [530, 532, 534, 536]
    with pytest.raises(DataError, match="whole number"):
        forecaster(freq="D").fit(numbered).predict()


def test_irregular_steps_need_a_frequency() -> None:
    odd = frame(names=["a"])
    odd["ds"] = pd.Timestamp("2015-01-01") + pd.to_timedelta(np.arange(260) ** 2, unit="h")
    with pytest.raises(DataError, match="not regular"):
        forecaster().fit(odd).predict()
    assert len(forecaster(freq="D").fit(odd).predict()) == 4


def test_a_pooled_model_forecasts_series_that_it_has_not_met(prices: pd.DataFrame) -> None:
    pooled = forecaster(pooled=True).fit(prices)
    assert pooled.predict()["unique_id"].unique().tolist() == ["a", "b"]
    stranger = pooled.predict(df=frame(names=["c"], seed=9), level=[80])
    assert stranger["unique_id"].unique().tolist() == ["c"]
    assert np.isfinite(stranger["MambaForecaster"]).all()
    with pytest.raises(DataError, match="pooled=True"):
        forecaster().fit(prices).predict(df=frame(names=["c"]))


def test_a_covariate_is_read_and_missed() -> None:
    with_month = frame(names=["a"])
    generator = np.random.default_rng(0)
    with_month["signal"] = generator.standard_normal(260)
    made = forecaster(covariates=["signal"]).fit(with_month)
    assert np.isfinite(made.predict()["MambaForecaster"]).all()
    with pytest.raises(DataError, match="lacks the column signal"):
        made.predict(df=frame(names=["a"]))
    with pytest.raises(DataError, match="column signal, which is not read"):
        forecaster().fit(with_month)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_saved_forecaster_forecasts_the_same(prices: pd.DataFrame, tmp_path: Path, pooled: bool) -> None:
    made = forecaster(pooled=pooled, freq="B").fit(prices)
    made.save(tmp_path / "stored")
    loaded = MambaForecaster.load(tmp_path / "stored")
    pd.testing.assert_frame_equal(loaded.predict(level=[80]), made.predict(level=[80]))
    pd.testing.assert_frame_equal(
        loaded.predict(df=prices[prices["unique_id"] == "b"]), made.predict(df=prices[prices["unique_id"] == "b"])
    )
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "stored")


def test_a_damaged_forecaster_is_refused(fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path / "stored")
    with (tmp_path / "stored" / "forecaster.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ArtefactError, match="damaged"):
        MambaForecaster.load(tmp_path / "stored")


def test_one_frame_gives_one_forecast(prices: pd.DataFrame, fitted) -> None:
    pd.testing.assert_frame_equal(forecaster().fit(prices).predict(), fitted.predict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda df: df.drop(columns="y"), "lacks the column y"),
        (lambda df: df.assign(y=np.nan), "column y must be finite"),
        (lambda df: df.assign(y="text"), "column y must hold numbers"),
        (lambda df: pd.concat([df, df[:1]]), "twice"),
        (lambda df: df[:0], "empty"),
        (lambda df: df[:80], "80 steps are too few"),
        (lambda df: df.assign(ds=1.5), "ds must hold"),
        (lambda df: df["y"].to_numpy(), "frame of pandas or polars"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(prices: pd.DataFrame, change, words: str) -> None:
    with pytest.raises(DataError, match=words):
        forecaster().fit(change(prices))


def test_arguments_out_of_range_are_refused(fitted, prices: pd.DataFrame) -> None:
    for attempt, words in (
        (lambda: MambaForecaster(0), "h must be at least 1"),
        (lambda: MambaForecaster(3, target="return"), "target must be"),
        (lambda: MambaForecaster(3).predict(), "call fit"),
        (lambda: MambaForecaster(3).save("x"), "call fit"),
        (lambda: fitted.predict(h=5), "h must be within 1 and 4"),
        (lambda: fitted.predict(level=[81]), "level must be of"),
        (lambda: fitted.cross_validation(prices, n_windows=0), "at least 1"),
    ):
        with pytest.raises(DataError, match=words):
            attempt()


def test_quantiles_of_a_level_are_those_of_the_distribution(fitted) -> None:
    forecast = fitted.predict(level=[50, 80, 95])
    lows = [forecast[f"MambaForecaster-lo-{level}"] for level in (95, 80, 50)]
    assert (lows[0] < lows[1]).all()
    assert (lows[1] < lows[2]).all()
