"""Forecasts from stored models: where a price may be after each horizon, and how sure that is.

The model speaks of log returns. A price follows as

    price_h = current price * exp(r_h)

of the mean log return and of each of its quantiles; so the price is the forecast's centre on the log scale, and lies
a little below the mean of the price itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mambakit.errors import DataError
from mambakit.forecast.artefact import SavedForecaster, load_forecaster
from mambakit.forecast.config import QUANTILES
from mambakit.forecast.dataset import column_names, feature_engineer, raw_features
from mambakit.forecast.model import Distribution, MambaModel
from mambakit.forecast.prices import PriceSeries, parse_symbol
from mambakit.forecast.quality import require_quality
from mambakit.forecast.registry import PRODUCTION, ModelRegistry
from mambakit.forecast.volatility import ewma_volatility, volatility_terms
from mambakit.forecast.windows import FeatureScaler

# Shares of outcomes between two of the quantiles.
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
    distribution = last_distribution(saved.model, saved.scaler, series, covariates)
    return Forecast(
        symbol=saved.symbol,
        version=saved.version,
        as_of=series.dates[-1],
        current_price=float(series.prices[-1]) if current_price is None else float(current_price),
        horizons=saved.config.prediction_horizons,
        mean=distribution.mean[0].double().numpy(),
        quantiles=distribution.quantiles[0].double().numpy(),
        drift=saved.model.drift[0].double().numpy(),
    )


@torch.no_grad()
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
    config = model.config
    engineer = feature_engineer(config)
    require_quality(series, min_samples=engineer.warm_up + config.sequence_length)
    raw = raw_features(series, config, covariates)
    if config.training_mode == "windows":
        first = len(series) - config.sequence_length
    else:
        first = int(np.isfinite(raw).all(axis=1).argmax())
    incomplete = ~np.isfinite(raw[first:]).all(axis=0)
    if incomplete.any():
        name = column_names(config)[int(incomplete.argmax())]
        raise DataError(f"{series.symbol}: {name} is not finite on every day that the model reads")
    rows = slice(first, None)
    features = torch.from_numpy(scaler.transform(raw[rows]))[None]
    volatility = torch.from_numpy(ewma_volatility(series.prices)[rows].astype(np.float32))[None]
    terms = torch.from_numpy(volatility_terms(series.prices)[rows].astype(np.float32))[None]
    numbers = torch.tensor([symbol])
    if config.training_mode == "windows":
        return model(features, volatility[:, -1], terms, numbers)
    return Distribution(*(values[:, -1] for values in model(features, volatility, terms, numbers)))


class MambaPredictor:
    """Serves the stored models of some symbols; each is loaded and checked once, on its first use.

    Args:
        symbols: whose models to serve.
        models: the folder that `mambakit forecast train --out` wrote to.
        version: a version such as "v2", or an alias.

    Example::

        predictor = MambaPredictor(["AAPL"], models="models")
        series = fetch_historical_prices(["AAPL"])["AAPL"]
        predictor.predict("AAPL", series)             # {'1d': 54.9, '5d': 55.2, '10d': 55.5, '30d': 56.9}
        predictor.forecast(series).intervals(0.8)     # {'1d': (54.1, 55.6), ...}
    """

    def __init__(self, symbols: Iterable[str], models: str | Path = "models", version: str = PRODUCTION) -> None:
        self.symbols = tuple(parse_symbol(symbol) for symbol in symbols)
        self.version = version
        self._registry = ModelRegistry(models)
        self._loaded: dict[str, SavedForecaster] = {}

    def load(self, symbol: str) -> SavedForecaster:
        """The symbol's stored model; raises ArtefactError where there is none or it is damaged."""
        symbol = parse_symbol(symbol)
        if symbol not in self.symbols:
            raise DataError(f"this predictor serves {', '.join(self.symbols)}, not {symbol}")
        if symbol not in self._loaded:
            self._loaded[symbol] = load_forecaster(self._registry.find(symbol, self.version))
        return self._loaded[symbol]

    def forecast(self, series: PriceSeries, current_price: float | None = None) -> Forecast:
        """The distribution of the price of the series' symbol; see `forecast_series`."""
        return forecast_series(self.load(series.symbol), series, current_price)

    def predict(
        self, symbol: str, price_history: np.ndarray | PriceSeries, current_price: float | None = None
    ) -> dict[str, float]:
        """The forecast prices alone: {'1d': .., '5d': .., '10d': .., '30d': ..}.

        price_history holds adjusted closes (days,), oldest first; a model that reads volume needs a PriceSeries.
        """
        if isinstance(price_history, PriceSeries):
            series = price_history
        elif self.load(symbol).config.include_volume:
            raise DataError(f"the model of {symbol} reads volume: give price_history as a PriceSeries")
        else:
            series = _undated(symbol, np.asarray(price_history, dtype=np.float64))
        return forecast_series(self.load(symbol), series, current_price).prices()


def _undated(symbol: str, prices: np.ndarray) -> PriceSeries:
    """A series around bare prices; its days only count, and nothing shows them."""
    return PriceSeries(symbol, np.arange(len(prices)).astype("datetime64[D]"), prices, np.zeros(len(prices)))
