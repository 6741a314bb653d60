"""Forecasts from stored models: where a price may be after each horizon, and how sure that is.

The model speaks of log returns. A price follows as

    price_h = current price * exp(r_h)

of the mean log return and of each of its quantiles; so the price is the forecast's centre on the log scale, and lies
a little below the mean of the price itself.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.forecast.artefact import SavedForecaster, load_forecaster
from mambakit.forecast.config import QUANTILES, MambaConfig
from mambakit.forecast.dataset import column_names, days_with_prices, raw_features, shortest_history
from mambakit.forecast.evaluation import Evaluation
from mambakit.forecast.model import Distribution, MambaModel
from mambakit.forecast.prices import PriceSeries, parse_symbol
from mambakit.forecast.registry import PRODUCTION, ModelRegistry
from mambakit.forecast.volatility import ewma_volatility, volatility_terms
from mambakit.forecast.windows import FeatureScaler

# Shares of outcomes between two of the quantiles.
_WINDOWS_AT_ONCE = 256  # bounds the memory of a forecast of many days
LEVELS = tuple(round(1 - 2 * low, 6) for low in QUANTILES if low < 0.5)


@dataclass(frozen=True)
class Forecast:
    """A distribution of the price after each horizon, made at the close of one day."""

    symbol: str
    version: str
    as_of: np.datetime64
    current_price: float
    horizons: tuple[int, ...]  # trading days
    mean: np.ndarray  # (horizons,) log returns
    quantiles: np.ndarray  # (horizons, len(QUANTILES)) log returns
    drift: np.ndarray  # (horizons,) log returns, the training part's means

    def prices(self) -> dict[str, float]:
        """The price for each horizon, as {'1d': .., '5d': ..}."""
        prices = self.current_price * np.exp(self.mean)
        return {f"{horizon}d": float(price) for horizon, price in zip(self.horizons, prices, strict=True)}

    def intervals(self, level: float) -> dict[str, tuple[float, float]]:
        """Lower and upper price for each horizon; raises DataError for a level other than those of LEVELS."""
        if round(level, 6) not in LEVELS:
            raise DataError(f"level must be one of {', '.join(f'{each:g}' for each in LEVELS)}, got {level:g}")
        low, high = (QUANTILES.index(round((1 + sign * level) / 2, 6)) for sign in (-1, 1))
        bounds = self.current_price * np.exp(self.quantiles[:, [low, high]])
        return {
            f"{horizon}d": (float(lower), float(upper))
            for horizon, (lower, upper) in zip(self.horizons, bounds, strict=True)
        }


def forecast_series(
    saved: SavedForecaster,
    series: PriceSeries,
    current_price: float | None = None,
    *,
    covariates: Mapping[str, np.ndarray] | None = None,
) -> Forecast:
    """Forecast from the last day of a series, with features made exactly as in training.

    A model of sequences reads all days of the series, as it did in training: the more it is given, the better it knows
    the state of things.

    Args:
        current_price: what the returns are applied to; the series' last price where not given.
        covariates: (days,) each, those that the model was trained with.

    Raises:
        DataError: the series is shorter than a window and its warm-up, incomplete, or not positive, or the covariates
            are not those of the training.
    """
    if current_price is not None and not (np.isfinite(current_price) and current_price > 0):
        raise DataError(f"current_price must be positive and finite, got {current_price}")
    series, covariates = days_with_prices(series, covariates, shortest_history(saved.config))
    number = saved.number(series.symbol)
    distribution = last_distribution(saved.model, saved.scaler, series, covariates, number)
    return Forecast(
        symbol=saved.symbol,
        version=saved.version,
        as_of=series.dates[-1],
        current_price=float(series.prices[-1]) if current_price is None else float(current_price),
        horizons=saved.config.prediction_horizons,
        mean=distribution.mean[0].double().numpy(),
        quantiles=distribution.quantiles[0].double().numpy(),
        drift=saved.model.drift[number].double().numpy(),
    )


def last_distribution(
    model: MambaModel,
    scaler: FeatureScaler,
    series: PriceSeries,
    covariates: Mapping[str, np.ndarray] | None = None,
    symbol: int = 0,
) -> Distribution:
    """The distribution of log returns (1, horizons) after the last day of a series; see `forecast_series`.

    Args:
        symbol: its number in a pooled model.
    """
    series, covariates = days_with_prices(series, covariates, shortest_history(model.config))
    return distributions_after(model, scaler, series, np.array([len(series) - 1]), covariates, symbol)


@torch.no_grad()
def distributions_after(
    model: MambaModel,
    scaler: FeatureScaler,
    series: PriceSeries,
    days: np.ndarray,
    covariates: Mapping[str, np.ndarray] | None = None,
    symbol: int = 0,
) -> Distribution:
    """The distributions of log returns (days, horizons) after some days of a series, each from its own past alone.

    Args:
        days: (days,) rows of the series, increasing.
        symbol: its number in a pooled model.

    Raises DataError where a day has too short a past, or a number that the model reads is not finite.
    """
    config = model.config
    raw = raw_features(series, config, covariates)
    if days[0] + 1 < shortest_history(config):
        raise DataError(
            f"{series.symbol}: {series.dates[days[0]]} has {days[0] + 1} days up to it, "
            f"and {shortest_history(config)} are needed"
        )
    windowed = config.training_mode == "windows"
    complete = int(np.isfinite(raw).all(axis=1).argmax())
    first = int(days[0]) - config.sequence_length + 1 if windowed else complete
    incomplete = ~np.isfinite(raw[first : days[-1] + 1]).all(axis=0)
    if incomplete.any():
        name = column_names(config)[int(incomplete.argmax())]
        raise DataError(f"{series.symbol}: {name} is not finite on every day that the model reads")
    features = torch.from_numpy(scaler.transform(raw))
    volatility = torch.from_numpy(ewma_volatility(series.prices).astype(np.float32))
    terms = torch.from_numpy(volatility_terms(series.prices).astype(np.float32))
    rows = torch.from_numpy(days)
    if not windowed:
        known = slice(first, int(days[-1]) + 1)
        numbers = torch.tensor([symbol])
        forecast = model(features[None, known], volatility[None, known], terms[None, known], numbers)
        return Distribution(*(values[0, rows - first] for values in forecast))
    parts = []
    for some in rows.split(_WINDOWS_AT_ONCE):
        windows = some[:, None] + torch.arange(1 - config.sequence_length, 1)
        numbers = torch.full((len(some),), symbol)
        parts.append(model(features[windows], volatility[some], terms[windows], numbers))
    return Distribution(*(torch.cat(values) for values in zip(*parts, strict=True)))


class MambaPredictor:
    """Trains and serves models of some symbols; a stored one is loaded and checked once, on its first use.

    Args:
        symbols: whose models to train and serve.
        config: of the models to train. A stored model that was made with another configuration is then refused; by
            default any is served, and the default configuration trained.
        models: the folder that models are stored in, as by `mambakit forecast train --out`.
        version: a version such as "v2", or an alias.
        pooled: serve the pooled model of that folder for all of the symbols, also those that it has not met.

    Example::

        predictor = MambaPredictor(["AAPL"], models="models")
        series = fetch_historical_prices(["AAPL"])["AAPL"]
        predictor.train({"AAPL": series}, epochs=20)
        predictor.predict_now("AAPL", series)          # {'1d': 54.9, '5d': 55.2, '10d': 55.5, '30d': 56.9}
        predictor.predict_distribution("AAPL", series).intervals(0.8)     # {'1d': (54.1, 55.6), ...}
    """

    def __init__(
        self,
        symbols: Iterable[str],
        config: MambaConfig | None = None,
        models: str | Path = "models",
        version: str = PRODUCTION,
        *,
        pooled: bool = False,
    ) -> None:
        if isinstance(symbols, str):
            raise DataError(f"symbols must be a list such as [{symbols!r}], got a single name")
        self.symbols = tuple(parse_symbol(symbol) for symbol in symbols)
        self.config = config
        self.version = version
        self.pooled = pooled
        self._models = Path(models)
        self._loaded: dict[str, SavedForecaster] = {}

    def train(
        self,
        training_data: Mapping[str, np.ndarray | PriceSeries],
        epochs: int = 50,
        *,
        quiet: bool = False,
    ) -> dict[str, Evaluation]:
        """Train a model of each symbol in the data, store it as the next version, and return how each did.

        Nothing is trained before all of the data was checked. With `pooled` one model learns from all of it.

        Args:
            training_data: adjusted closes (days,), oldest first, or a PriceSeries, by symbol.
            epochs: passes over the training part, at most.

        Raises:
            DataError: a symbol that this predictor does not serve, or data that can't be trained on.
        """
        from mambakit.forecast.config import default_training, pooled_training
        from mambakit.forecast.pooled import prepare_pooled, train_and_store_pooled
        from mambakit.forecast.workflow import prepare_all, train_and_store

        config = MambaConfig() if self.config is None else self.config
        if config.covariates:
            raise DataError("covariates need prepare_series and train_prepared, which take them")
        series = [self._series(self._served(symbol), data) for symbol, data in training_data.items()]
        if not series:
            raise DataError("training_data is empty: expected prices of at least one symbol")
        default = pooled_training if self.pooled else default_training
        settings = default(config.training_mode).model_copy(update={"epochs": epochs})
        self._loaded.clear()
        if self.pooled:
            stored = train_and_store_pooled(prepare_pooled(series, config), settings, self._models, quiet=quiet)
            return stored.trained.evaluations
        registry = ModelRegistry(self._models)
        ready, failures = prepare_all(series, config, registry)
        if failures:
            raise DataError("; ".join(failure.reason for failure in failures))
        outcomes = [train_and_store(prepared, settings, registry, quiet=quiet) for prepared in ready]
        return {outcome.symbol: outcome.evaluation for outcome in outcomes}

    def load(self, symbol: str) -> SavedForecaster:
        """The symbol's stored model; raises ArtefactError where there is none or it is damaged."""
        symbol = self._served(symbol)
        if symbol not in self._loaded:
            saved = self._find(symbol)
            if self.config is not None and saved.config != self.config:
                raise DataError(
                    f"the stored model {saved.version} of {symbol} was trained with another configuration "
                    f"({_differences(saved.config, self.config)}): train it with this one, or give no config"
                )
            self._loaded[symbol] = saved
        return self._loaded[symbol]

    async def predict(
        self,
        symbol: str,
        price_history: np.ndarray | PriceSeries,
        current_price: float | None = None,
        *,
        covariates: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """`predict_now`, awaited; the work is done in a thread, so that an event loop goes on meanwhile."""
        return await asyncio.to_thread(self.predict_now, symbol, price_history, current_price, covariates=covariates)

    def predict_now(
        self,
        symbol: str,
        price_history: np.ndarray | PriceSeries,
        current_price: float | None = None,
        *,
        covariates: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """The forecast prices alone: {'1d': .., '5d': .., '10d': .., '30d': ..}; see `predict_distribution`."""
        return self.predict_distribution(symbol, price_history, current_price, covariates=covariates).prices()

    def predict_distribution(
        self,
        symbol: str,
        price_history: np.ndarray | PriceSeries,
        current_price: float | None = None,
        *,
        covariates: Mapping[str, np.ndarray] | None = None,
    ) -> Forecast:
        """The distribution of the price after each horizon, with its quantiles.

        Args:
            price_history: adjusted closes (days,), oldest first; a model that reads volume needs a PriceSeries.
            current_price: what the returns are applied to; the last of the history where not given.
            covariates: (days,) each, those that the model was trained with.
        """
        saved = self.load(symbol)
        if saved.config.include_volume and not isinstance(price_history, PriceSeries):
            raise DataError(f"the model of {saved.symbol} reads volume: give price_history as a PriceSeries")
        series = self._series(self._served(symbol), price_history)
        return forecast_series(saved, series, current_price, covariates=covariates)

    def forecast(self, series: PriceSeries, current_price: float | None = None) -> Forecast:
        """The distribution of the price of the series' symbol; see `forecast_series`."""
        return forecast_series(self.load(series.symbol), series, current_price)

    def _served(self, symbol: str) -> str:
        symbol = parse_symbol(symbol)
        if symbol not in self.symbols:
            raise DataError(f"this predictor serves {', '.join(self.symbols)}, not {symbol}")
        return symbol

    def _find(self, symbol: str) -> SavedForecaster:
        if self.pooled:
            from mambakit.forecast.pool_registry import load_pooled

            return load_pooled(self._models, symbol, self.version)
        return load_forecaster(ModelRegistry(self._models).find(symbol, self.version))

    def _series(self, symbol: str, history: np.ndarray | PriceSeries) -> PriceSeries:
        if isinstance(history, PriceSeries):
            if history.symbol != symbol:
                raise DataError(f"the prices of {history.symbol} were given for {symbol}")
            return history
        prices = np.asarray(history, dtype=np.float64)
        if prices.ndim != 1:
            raise DataError(f"{symbol}: prices must be one-dimensional, got shape {prices.shape}")
        return _undated(symbol, prices)


def _differences(stored: MambaConfig, asked: MambaConfig) -> str:
    """Which settings differ, and how."""
    pairs = [(name, value, getattr(asked, name)) for name, value in stored]
    return ", ".join(f"{name} is {value}, not {other}" for name, value, other in pairs if value != other)


def _undated(symbol: str, prices: np.ndarray) -> PriceSeries:
    """A series around bare prices, whose days, from 1970-01-01 on, only count."""
    return PriceSeries(symbol, np.arange(len(prices)).astype("datetime64[D]"), prices, np.zeros(len(prices)))
