"""Forecasts of tidy frames: unique_id, ds and y in, a forecast of every step for every series out.

The interface is that of Nixtla's libraries, and its frames go through utilsforecast's evaluation. Frames may be pandas'
or polars'; what comes out is of the kind that went in.

The models speak of log returns of a price. Any other series, `target="value"`, is read as the logarithm of one: its
usual step is made 1% (by the part of it that is learnt from), and the forecast is taken back. So values may be
negative, and it is their differences that are forecast, in units of how much they have moved lately.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from narwhals.typing import IntoDataFrameT
from pydantic import ValidationError

from mambakit.errors import ArtefactError, DataError
from mambakit.forecast.artefact import read_model, write_model
from mambakit.forecast.config import QUANTILES, MambaConfig, default_training, pooled_training
from mambakit.forecast.dataset import PreparedSeries, feature_engineer, prepare_series
from mambakit.forecast.model import MambaModel
from mambakit.forecast.predictor import LEVELS, last_distribution
from mambakit.forecast.prices import PriceSeries
from mambakit.forecast.tidy_frames import Freq, LongFrame, build_frame, future_steps, read_frame
from mambakit.forecast.windows import FeatureScaler, Split
from mambakit.training import TrainingConfig
from mambakit.training.artefacts import read_json, verify_folder, write_folder, write_json

Target = Literal["price", "value"]
NAME = "MambaForecaster"

_VALIDATION_SHARE = 0.25
_LEAST_TRAINING, _LEAST_VALIDATION = 50, 10  # samples
_USUAL_STEP = 0.01  # of a value, on the scale of logarithms


@dataclass(frozen=True)
class _Fitted:
    """A network and what it takes to read a series with it."""

    model: MambaModel
    scaler: FeatureScaler
    numbers: Mapping[Any, int]  # of the series, in a pooled model
    units: Mapping[Any, float]  # of each series' values; 1 for prices


class MambaForecaster:
    """Forecasts every step up to a horizon for every series of a long frame.

    Args:
        h: steps to forecast, 1..h.
        freq: from one step to the next, a pandas offset such as "B", "D", "MS" or "h", or a whole number where ds are
            numbers. Inferred from ds where not given.
        target: "price" for positive series that grow by percentages, whose returns are modelled; "value" for any other.
        config: sizes and mode of the model; its horizons are replaced by 1..h. By default the preset "small".
        training: settings of the training; those that suit the mode by default.
        pooled: one model for all series instead of one for each. It also forecasts series that it has not met.
        covariates: names of further columns to read, each known when its step is over.
        quiet: no progress.

    Raises DataError for arguments out of range.

    Example::

        forecaster = MambaForecaster(h=5, freq="B").fit(frame)      # unique_id, ds, y
        forecaster.predict(level=[80])         # unique_id, ds, MambaForecaster, MambaForecaster-lo-80, ...-hi-80
        forecaster.cross_validation(frame, n_windows=4, step_size=5)         # with cutoff and y
    """

    def __init__(
        self,
        h: int,
        freq: Freq | None = None,
        *,
        target: Target = "price",
        config: MambaConfig | None = None,
        training: TrainingConfig | None = None,
        pooled: bool = False,
        covariates: Sequence[str] = (),
        quiet: bool = True,
    ) -> None:
        if h < 1:
            raise DataError(f"h must be at least 1, got {h}")
        if target not in ("price", "value"):
            raise DataError(f"target must be 'price' or 'value', got {target!r}")
        base = MambaConfig.preset("small") if config is None else config
        changes = {"prediction_horizons": tuple(range(1, h + 1)), "covariates": tuple(covariates)}
        self.h, self.freq, self.target, self.pooled, self.quiet = h, freq, target, pooled, quiet
        self.config = MambaConfig.model_validate(base.model_dump() | changes)
        default = pooled_training if pooled else default_training
        self.training = default(self.config.training_mode) if training is None else training
        self._fitted: dict[Any, _Fitted] = {}
        self._history: LongFrame | None = None

    def fit(self, df: IntoDataFrameT) -> "MambaForecaster":
        """Learn from every series of a frame with unique_id, ds, y and the covariates; returns itself.

        The last quarter of each series stops the training and is not learnt from otherwise.

        Raises DataError where a column is missing, not known or not finite, a series is too short, or steps are
        missing.
        """
        history = self._read(df)
        self._fitted = self._train(history)
        self._history = history
        return self

    def predict(
        self, h: int | None = None, df: IntoDataFrameT | None = None, level: Sequence[float] | None = None
    ) -> Any:
        """Forecast the steps after the last of every series.

        Args:
            h: how many steps, at most those it was made for.
            df: series to forecast from, by default those it was fitted on. A pooled model takes any.
            level: intervals to add, in percent, such as [80, 95].

        Returns:
            A frame with unique_id, ds, MambaForecaster and, for each level, MambaForecaster-lo-80 and -hi-80.

        Raises DataError before `fit`, for a level or h that there is none of, and for series it can't forecast.
        """
        if self._history is None:
            raise DataError("call fit before predict")
        history = self._history if df is None else self._read(df)
        steps = self._steps(h)
        levels = _checked_levels(level)
        columns: dict[str, list[np.ndarray]] = {}
        for name, rows in history.series():
            forecast = self._forecast(history, name, rows, self._fitted, levels)
            ds = future_steps(history.ds[rows], self.freq, steps, name)
            block = {"unique_id": np.repeat(np.asarray([name]), steps), "ds": ds}
            _append(columns, block | {column: values[:steps] for column, values in forecast.items()})
        return build_frame(columns, history)

    def cross_validation(
        self,
        df: IntoDataFrameT,
        n_windows: int = 1,
        step_size: int = 1,
        *,
        h: int | None = None,
        level: Sequence[float] | None = None,
        refit: bool = False,
    ) -> Any:
        """Forecast from several days of the past, beside what came.

        The last window ends with the series, and each window before it `step_size` steps earlier. Without `refit` one
        model learns from what was known before the first window and forecasts all of them, each from all that was
        known then; with it, a model is trained for every window.

        Returns:
            A frame with unique_id, ds, cutoff (the last step known), y, MambaForecaster and intervals. What `predict`
            forecasts with is left as it was.

        Raises DataError for windows that the series are too short for, and as `fit` and `predict` do.
        """
        if n_windows < 1 or step_size < 1:
            raise DataError(f"n_windows and step_size must be at least 1, got {n_windows} and {step_size}")
        whole, steps, levels = self._read(df), self._steps(h), _checked_levels(level)
        columns: dict[str, list[np.ndarray]] = {}
        fitted: dict[Any, _Fitted] = {}
        for window in range(n_windows):
            left_out = steps + (n_windows - 1 - window) * step_size
            known = whole.without_last(left_out)
            if refit or not fitted:
                fitted = self._train(known)
            for (name, rows), (_, all_rows) in zip(known.series(), whole.series(), strict=True):
                forecast = self._forecast(known, name, rows, fitted, levels)
                ahead = np.arange(rows.stop - rows.start, rows.stop - rows.start + steps) + all_rows.start
                block = {
                    "unique_id": np.repeat(np.asarray([name]), steps),
                    "ds": whole.ds[ahead],
                    "cutoff": np.repeat(known.ds[rows.stop - 1 : rows.stop], steps),
                    "y": whole.y[ahead],
                }
                _append(columns, block | {column: values[:steps] for column, values in forecast.items()})
        return build_frame(columns, whole, order=("unique_id", "cutoff", "ds"))

    def save(self, path: str | Path) -> None:
        """Write the fitted forecaster, with the series it was fitted on, as a new folder of plain files.

        Raises DataError before `fit`, FileExistsError where the path exists, ArtefactError where it can't be written.
        """
        if self._history is None:
            raise DataError("call fit before save")
        history = self._history
        names = [history.plain(name) for name, _ in history.series()]
        models: list[_Fitted] = list({id(each): each for each in self._fitted.values()}.values())
        about = {
            "h": self.h,
            "freq": self.freq,
            "target": self.target,
            "pooled": self.pooled,
            "config": self.config.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "series": names,
            "units": [float(self._fitted[name].units[name]) for name, _ in history.series()],
        }

        def fill(folder: Path) -> None:
            write_json(folder / "forecaster.json", about)
            history.write(folder / "history.parquet")
            for position, each in enumerate(models):
                (folder / "models" / str(position)).mkdir(parents=True)
                write_model(folder / "models" / str(position), each.model, each.scaler)

        write_folder(path, fill)

    @classmethod
    def load(cls, path: str | Path) -> "MambaForecaster":
        """Read what `save` wrote; raises ArtefactError where it is missing, damaged or something else.

        Frames come out as pandas' until `predict` is given one of another kind.
        """
        folder = Path(path)
        verify_folder(folder)
        about = read_json(folder / "forecaster.json")
        try:
            config = MambaConfig.model_validate(about["config"])
            training = TrainingConfig.model_validate(about["training"])
            made = cls(
                about["h"],
                about["freq"],
                target=about["target"],
                config=config,
                training=training,
                pooled=about["pooled"],
                covariates=config.covariates,
            )
            history = LongFrame.read(folder / "history.parquet", config.covariates)
            names = [name for name, _ in history.series()]
            units = dict(zip(names, about["units"], strict=True))
            if made.pooled:
                model, scaler = read_model(folder / "models" / "0", len(names))
                numbers = {name: number for number, name in enumerate(names, start=1)}
                made._fitted = dict.fromkeys(names, _Fitted(model, scaler, numbers, units))
            else:
                for position, name in enumerate(names):
                    model, scaler = read_model(folder / "models" / str(position))
                    made._fitted[name] = _Fitted(model, scaler, {}, units)
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise ArtefactError(f"{path} is not a forecaster that this version can read ({reason})") from error
        made._history = history
        return made

    def _read(self, df: IntoDataFrameT) -> LongFrame:
        frame = read_frame(df, self.config.covariates)
        if self.target == "price" and not (frame.y > 0).all():
            row = int((frame.y <= 0).argmax())
            raise DataError(
                f"y of {frame.unique_id[row]} is {frame.y[row]:g}, and prices are positive: choose target='value'"
            )
        return frame

    def _steps(self, h: int | None) -> int:
        steps = self.h if h is None else h
        if not 1 <= steps <= self.h:
            raise DataError(f"h must be within 1 and {self.h}, which this forecaster was made for, got {h}")
        return steps

    def _train(self, history: LongFrame) -> dict[Any, _Fitted]:
        """A model of each series, or one of all, for the names of the series."""
        from mambakit.forecast.pooled import train_pooled_network, with_common_scaler
        from mambakit.forecast.train import train_network

        units = {name: self._unit(history.y[rows]) for name, rows in history.series()}
        prepared = {name: self._prepare(history, name, rows, units[name]) for name, rows in history.series()}
        if self.pooled:
            together = with_common_scaler(list(prepared.values()))
            model, _ = train_pooled_network(together, self.training, quiet=self.quiet)
            numbers = {name: number for number, name in enumerate(prepared, start=1)}
            return dict.fromkeys(prepared, _Fitted(model, together[0].scaler, numbers, units))
        fitted = {}
        for name, each in prepared.items():
            model, _ = train_network(each, self.training, quiet=self.quiet)
            fitted[name] = _Fitted(model, each.scaler, {}, units)
        return fitted

    def _unit(self, y: np.ndarray) -> float:
        """What one unit on the scale of logarithms is worth."""
        if self.target == "price":
            return 1.0
        learnt = y[: max(2, int(len(y) * (1 - _VALIDATION_SHARE)))]
        step = float(np.abs(np.diff(learnt)).mean())
        return step / _USUAL_STEP if step > 0 else 1.0

    def _as_prices(self, history: LongFrame, name: Any, rows: slice, unit: float) -> PriceSeries:
        y = history.y[rows]
        prices = y if self.target == "price" else np.exp((y - y[0]) / unit)
        if not np.isfinite(prices).all() or (prices == 0).any():
            raise DataError(
                f"{name}: y wanders too far for its usual step of {unit * _USUAL_STEP:g}; leave out its past, or "
                "forecast its logarithm"
            )
        return PriceSeries(str(name), np.arange(len(y)).astype("datetime64[D]"), prices, np.zeros(len(y)))

    def _prepare(self, history: LongFrame, name: Any, rows: slice, unit: float) -> PreparedSeries:
        series = self._as_prices(history, name, rows, unit)
        engineer = feature_engineer(self.config)
        first = engineer.warm_up + self.config.sequence_length - 1
        samples = len(series) - first - self.h
        validation = max(_LEAST_VALIDATION, round(samples * _VALIDATION_SHARE))
        training = samples - validation - self.h
        if training < _LEAST_TRAINING:
            needed = first + 2 * self.h + _LEAST_VALIDATION + max(_LEAST_TRAINING, 3 * _LEAST_VALIDATION)
            raise DataError(
                f"{name}: {len(series)} steps are too few, about {needed} are needed for h={self.h}; forecast fewer "
                f"steps, or give a config with shorter windows than {self.config.windows} and a shorter "
                f"sequence_length than {self.config.sequence_length}"
            )
        split = Split(np.arange(training), np.arange(samples - validation, samples), np.arange(0))
        return prepare_series(series, self.config, split=split, covariates=history.covariates_of(rows))

    def _forecast(
        self,
        history: LongFrame,
        name: Any,
        rows: slice,
        fitted: Mapping[Any, _Fitted],
        levels: Sequence[float],
    ) -> dict[str, np.ndarray]:
        """The columns (h,) of a series' forecast."""
        if name in fitted:
            mine = fitted[name]
            unit = mine.units[name]
        elif self.pooled:
            mine = next(iter(fitted.values()))
            unit = self._unit(history.y[rows])
        else:
            raise DataError(f"{name} is not among the series that were fitted; pooled=True forecasts others as well")
        series = self._as_prices(history, name, rows, unit)
        distribution = last_distribution(
            mine.model, mine.scaler, series, history.covariates_of(rows), mine.numbers.get(name, 0)
        )
        last = history.y[rows.stop - 1]

        def back(log_returns: np.ndarray) -> np.ndarray:
            return last * np.exp(log_returns) if self.target == "price" else last + unit * log_returns

        quantiles = distribution.quantiles[0].double().numpy()  # (h, levels)
        columns = {NAME: back(distribution.mean[0].double().numpy())}
        for level in levels:
            for side, sign in (("lo", -1), ("hi", 1)):
                place = QUANTILES.index(round((1 + sign * level / 100) / 2, 6))
                columns[f"{NAME}-{side}-{level:g}"] = back(quantiles[:, place])
        return columns


def _checked_levels(level: Sequence[float] | None) -> list[float]:
    levels = [] if level is None else list(level)
    known = [round(100 * each, 4) for each in LEVELS]
    for each in levels:
        if each not in known:
            raise DataError(f"level must be of {', '.join(f'{value:g}' for value in known)}, got {each}")
    return levels


def _append(columns: dict[str, list[np.ndarray]], block: Mapping[str, np.ndarray]) -> None:
    for name, values in block.items():
        columns.setdefault(name, []).append(values)
