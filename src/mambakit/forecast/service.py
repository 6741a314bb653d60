"""Serving: an answer for every request that can have one, which says where it comes from.

The model answers, unless it is missing, damaged, stale or fed bad data; then the fallback does, and its reason is part
of the answer. Where a challenger is tried, both arms forecast, one is shown, and both are logged.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mambakit.errors import ArtefactError, DataError, MambakitError
from mambakit.forecast.ab import assign
from mambakit.forecast.artefact import SavedForecaster
from mambakit.forecast.config import MambaConfig
from mambakit.forecast.dataset import feature_engineer, raw_features
from mambakit.forecast.fallback import FALLBACK, FallbackForecaster, cautious_volatility
from mambakit.forecast.pool_registry import POOLED, pooled_registry, resolve_pooled
from mambakit.forecast.prediction_log import LogEntry, PredictionLog
from mambakit.forecast.predictor import Forecast, MambaPredictor
from mambakit.forecast.prices import PriceSeries, parse_symbol
from mambakit.forecast.registry import ALIASES, CHALLENGER, PRODUCTION, ModelRegistry
from mambakit.forecast.volatility import ewma_volatility

MAX_AGE_DAYS = 365


@dataclass(frozen=True)
class ServedForecast(Forecast):
    """A forecast and where it comes from."""

    source: str = ""  # a stored version, such as "v3", or "fallback"
    reason: str | None = None  # why the fallback answers, or what was done to the data
    arm: str = PRODUCTION  # "production", "challenger", or "fallback"
    unlogged: str | None = None  # why it could not be logged


class ForecastService:
    """Forecasts from the stored models of a folder, with a fallback, an optional challenger and an optional log.

    Promotions and roll-backs take effect with the next request; a version is loaded and checked once.

    Args:
        models: the folder that `mambakit forecast train --out` wrote to.
        use: a version such as "v2", or an alias.
        max_age_days: calendar days that prices may go on after the last day of the model's data; with more, it is
            stale. None: never.
        fallback: answer by the fallback where the model can't; otherwise raise what is wrong.
        log: where forecasts are logged; None: nowhere.
        challenger_share: of the keys that are shown the challenger's forecast, 0 to 1; 0 runs no challenger.
        salt: see `mambakit.forecast.ab.assign`.
        pooled: serve the pooled model, which any symbol may ask.

    Example::

        service = ForecastService("models", log=PredictionLog("models/predictions.sqlite"))
        answer = service.serve("AAPL", fetch_historical_prices(["AAPL"])["AAPL"])
        answer.prices(), answer.source, answer.reason      # {'1d': 56.2, ...}, 'v3', None
    """

    def __init__(
        self,
        models: str | Path = "models",
        *,
        use: str = PRODUCTION,
        max_age_days: int | None = MAX_AGE_DAYS,
        fallback: bool = True,
        log: PredictionLog | None = None,
        challenger_share: float = 0.0,
        salt: str = "mambakit",
        pooled: bool = False,
    ) -> None:
        assign("", challenger_share, salt)  # a share out of bounds is found here, not by the first customer
        if challenger_share > 0 and use != PRODUCTION:
            raise DataError(f"a challenger is tried beside production, not beside {use!r}: leave out one of the two")
        self.use = use
        self.max_age_days = max_age_days
        self.fallback = fallback
        self.log = log
        self.challenger_share = challenger_share
        self.salt = salt
        self._models = models
        self.pooled = pooled
        self._registry = pooled_registry(models) if pooled else ModelRegistry(models)
        self._predictors: dict[tuple[str, str], MambaPredictor] = {}

    def load(self, symbol: str, use: str | None = None) -> SavedForecaster:
        """The symbol's model; raises ArtefactError where there is none or it is damaged."""
        return self._predictor(parse_symbol(symbol), self.use if use is None else use).load(symbol)

    def serve(
        self,
        symbol: str,
        history: PriceSeries | np.ndarray,
        current_price: float | None = None,
        *,
        key: str | None = None,
    ) -> ServedForecast:
        """Forecast from the last usable day of a history.

        Args:
            history: adjusted closes, oldest first, NaN where one is missing. Bare prices (days,) have no dates: they
                are never stale, and can't be logged.
            current_price: what the returns are applied to; the last usable price where not given.
            key: who asks, for the split between production and challenger; symbol and day where not given.

        Raises:
            DataError: the symbol or current_price is not one, there are no two usable prices, or bare prices are to
                be logged. Without fallback also: the data does not suit the model.
            ArtefactError: the version that was named is not there. Without fallback also: the model is missing,
                damaged, or stale.
        """
        symbol = parse_symbol(symbol)
        if current_price is not None and not (np.isfinite(current_price) and current_price > 0):
            raise DataError(f"current_price must be positive and finite, got {current_price}")
        dated = isinstance(history, PriceSeries)
        if not dated and self.log is not None:
            raise DataError("a log needs dates: give the history as a PriceSeries, or no log")
        series = history if isinstance(history, PriceSeries) else _undated(symbol, history)
        clean = clean_series(series)
        arms = (self.use,) if self.challenger_share == 0 else ALIASES
        entries, problems = self._ask_models(symbol, clean, current_price, arms, dated)
        self._require_answerable(symbol, entries, problems)
        notes = []
        if entries:
            wanted = self._wanted_arm(symbol, clean.series, key)
            shown = wanted if wanted in entries else next(iter(entries))
            notes += [f"{arm} can't answer: {problem}" for arm, problem in problems.items()]
            if clean.note is not None:
                notes.append(clean.note)
        else:
            shown = FALLBACK
            notes.append(str(problems[arms[0]]))
            entries[FALLBACK] = self._from_fallback(clean.series, current_price, problems[arms[0]])
        return self._answer(entries, shown, "; ".join(notes) or None)

    def _predictor(self, symbol: str, use: str) -> MambaPredictor:
        version = resolve_pooled(self._models, use) if self.pooled else self._registry.resolve(symbol, use)
        key = symbol, version
        if key not in self._predictors:
            self._predictors[key] = MambaPredictor([symbol], models=self._models, version=key[1], pooled=self.pooled)
        return self._predictors[key]

    def _stored_as(self, symbol: str) -> str:
        return POOLED if self.pooled else symbol

    def _ask_models(
        self, symbol: str, clean: "CleanSeries", current_price: float | None, arms: tuple[str, ...], dated: bool
    ) -> tuple[dict[str, LogEntry], dict[str, MambakitError]]:
        """The forecast of each arm, or why it has none."""
        entries: dict[str, LogEntry] = {}
        problems: dict[str, MambakitError] = {}
        for arm in arms:
            try:
                entries[arm] = self._from_model(symbol, clean, current_price, arm, dated)
            except (ArtefactError, DataError) as error:
                problems[arm] = error
        return entries, problems

    def _require_answerable(
        self, symbol: str, entries: dict[str, LogEntry], problems: dict[str, MambakitError]
    ) -> None:
        """Raise where the fallback would hide a wrong request, or is not wanted."""
        missing = self.use not in ALIASES and self.use not in self._registry.versions(self._stored_as(symbol))
        if not entries and (missing or not self.fallback):
            raise next(iter(problems.values()))

    def _wanted_arm(self, symbol: str, series: PriceSeries, key: str | None) -> str:
        if self.challenger_share == 0:
            return self.use
        return assign(f"{symbol}:{series.dates[-1]}" if key is None else key, self.challenger_share, self.salt)

    def _from_model(
        self, symbol: str, clean: "CleanSeries", current_price: float | None, arm: str, dated: bool
    ) -> LogEntry:
        predictor = self._predictor(symbol, arm)
        saved = predictor.load(symbol)
        _require_clean_window(clean, saved.config)
        if dated and self.max_age_days is not None:
            _require_fresh(saved, clean.series, self.max_age_days)
        # Named as the registry names it: a folder may be a copy of another version's.
        forecast = replace(predictor.forecast(clean.series, current_price), version=predictor.version)
        if not (np.isfinite(forecast.mean).all() and np.isfinite(forecast.quantiles).all()):
            raise ArtefactError(f"{symbol} {forecast.version} gives a forecast that is not finite; train it again")
        return LogEntry(
            forecast,
            trained_at=saved.metadata["training_date"],
            arm=CHALLENGER if arm == CHALLENGER else PRODUCTION,
            reason=clean.note,
            volatility=float(ewma_volatility(clean.series.prices)[-1]),
            features=raw_features(clean.series, saved.config)[-1],
        )

    def _from_fallback(self, series: PriceSeries, current_price: float | None, problem: MambakitError) -> LogEntry:
        try:
            forecaster = FallbackForecaster(self.load(series.symbol).config.prediction_horizons)
        except (ArtefactError, DataError):
            forecaster = FallbackForecaster()
        try:
            forecast = forecaster.forecast(series, current_price)
        except DataError as error:
            raise error from problem
        return LogEntry(forecast, arm=FALLBACK, reason=str(problem), volatility=cautious_volatility(series.prices))

    def _answer(self, entries: dict[str, LogEntry], shown: str, reason: str | None) -> ServedForecast:
        unlogged = None
        if self.log is not None:
            try:
                self.log.append(replace(entry, shown=arm == shown) for arm, entry in entries.items())
            except ArtefactError as error:
                unlogged = str(error)
        forecast = entries[shown].forecast
        content = {field.name: getattr(forecast, field.name) for field in fields(Forecast)}
        return ServedForecast(
            **content, source=forecast.version, reason=reason, arm=entries[shown].arm, unlogged=unlogged
        )


@dataclass(frozen=True)
class CleanSeries:
    """The usable days of a history, in the order of time, and which of its rows were not usable."""

    series: PriceSeries
    dates: np.ndarray  # (rows,) of the history as it came
    bad: np.ndarray  # (rows,) bool: the price is missing, not positive, or out of order
    bad_volume: np.ndarray  # (rows,) bool

    @property
    def note(self) -> str | None:
        """What was left out, in words; None for nothing."""
        count = int(self.bad.sum())
        if not count:
            return None
        return f"{count} of {len(self.bad)} prices are missing, not positive or out of order, and were left out"


def clean_series(series: PriceSeries) -> CleanSeries:
    """Leave out days without a usable price, sort the rest, and keep the last of several entries of one day.

    Volumes that can't be used become 0; whether that matters depends on who reads them.
    """
    prices = np.asarray(series.prices, dtype=np.float64)
    volumes = np.asarray(series.volumes, dtype=np.float64)
    days = series.dates.astype("datetime64[D]").astype(np.int64)
    usable = np.isfinite(prices) & (prices > 0) & ~np.isnat(series.dates)
    usable_volume = np.isfinite(volumes) & (volumes >= 0)
    bad = ~usable
    bad[1:] |= days[1:] <= np.maximum.accumulate(days)[:-1]
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(days[rows], kind="stable")]
    rows = rows[np.append(np.diff(days[rows]) > 0, True)] if len(rows) else rows
    clean = PriceSeries(series.symbol, series.dates[rows], prices[rows], np.where(usable_volume, volumes, 0.0)[rows])
    return CleanSeries(clean, series.dates, bad, ~usable_volume)


def _require_clean_window(clean: CleanSeries, config: MambaConfig) -> None:
    """Raise DataError where one of the days that the model reads is not usable."""
    window = feature_engineer(config).warm_up + config.sequence_length
    symbol, bad = clean.series.symbol, clean.bad[-window:]
    if not len(clean.series):
        raise DataError(f"{symbol}: there is no usable price")
    if bad.any():
        trailing = len(bad) if bad.all() else int(bad[::-1].argmin())
        if trailing:
            which = "price of the last day is" if trailing == 1 else f"prices of the last {trailing} days are"
            raise DataError(
                f"{symbol}: the {which} missing, not positive or out of order; "
                f"the last usable one is of {clean.series.dates[-1]}"
            )
        first = clean.dates[-window:][bad.argmax()]
        raise DataError(
            f"{symbol}: of the last {len(bad)} prices, which the model reads, {bad.sum()} "
            f"{'is' if bad.sum() == 1 else 'are'} missing, not positive or out of order, the first on {first}"
        )
    if config.include_volume and clean.bad_volume[-window:].any():
        first = clean.dates[-window:][clean.bad_volume[-window:].argmax()]
        raise DataError(f"{symbol}: the model reads volume, which is missing or negative, first on {first}")


def _require_fresh(saved: SavedForecaster, series: PriceSeries, max_age_days: int) -> None:
    trained_to = np.datetime64(saved.metadata["data_stats"]["last_day"])
    age = int((series.dates[-1].astype("datetime64[D]") - trained_to).astype(int))
    if age > max_age_days:
        raise ArtefactError(
            f"{saved.symbol} {saved.version} is stale: its data ends on {trained_to}, {age} days before these prices, "
            f"and {max_age_days} are allowed; train again with: mambakit forecast train --symbols {saved.symbol}"
        )


def _undated(symbol: str, prices: np.ndarray) -> PriceSeries:
    """A series around bare prices, whose days only count."""
    prices = np.asarray(prices, dtype=np.float64)
    if prices.ndim != 1:
        raise DataError(f"{symbol}: prices must be one-dimensional, got shape {prices.shape}")
    return PriceSeries(symbol, np.arange(len(prices)).astype("datetime64[D]"), prices, np.zeros(len(prices)))
