"""Is a series of prices fit to be forecast? One check after the other, the first that fails in one plain sentence."""

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries

# Below this standard deviation of daily log returns a series is a constant with rounding errors.
_SMALLEST_DEVIATION = 1e-8


def validate_data_quality(
    prices: np.ndarray, min_samples: int = 100, max_missing_ratio: float = 0.05
) -> tuple[bool, str]:
    """Check prices (days,); return (is it usable, the reason in words).

    Looked for, in this order: too few samples, more than `max_missing_ratio` of them NaN, infinite values, prices
    that are not positive, and no movement at all. NaN within the ratio are left out of the later checks.
    """
    prices = np.asarray(prices, dtype=np.float64)
    if prices.ndim != 1:
        return False, f"prices must be one-dimensional, got shape {prices.shape}"
    if len(prices) < min_samples:
        return False, f"{len(prices)} days of prices are too few, at least {min_samples} are needed"
    missing = np.isnan(prices)
    if missing.mean() > max_missing_ratio:
        return False, f"{missing.sum()} of {len(prices)} prices are missing (NaN), the first at row {missing.argmax()}"
    infinite = np.isinf(prices)
    if infinite.any():
        return False, f"{infinite.sum()} prices are infinite, the first at row {infinite.argmax()}"
    not_positive = prices <= 0
    if not_positive.any():
        row = not_positive.argmax()
        return False, f"{not_positive.sum()} prices are not positive, the first at row {row} ({prices[row]:g})"
    if np.diff(np.log(prices[~missing])).std() < _SMALLEST_DEVIATION:
        return False, "the prices do not move"
    return True, "ok"


def require_quality(series: PriceSeries, min_samples: int) -> None:
    """Raise DataError unless the series is complete, positive, long enough and in the order of its dates."""
    usable, reason = validate_data_quality(series.prices, min_samples=min_samples, max_missing_ratio=0.0)
    if not usable:
        raise DataError(f"{series.symbol}: {reason}")
    backwards = np.diff(series.dates.astype("datetime64[D]").astype(np.int64)) <= 0
    if backwards.any():
        later = series.dates[backwards.argmax() + 1]
        raise DataError(f"{series.symbol}: dates must increase, but {later} does not come after the date before it")
    if not np.isfinite(series.volumes).all() or (series.volumes < 0).any():
        raise DataError(f"{series.symbol}: volumes must be finite and not negative")
