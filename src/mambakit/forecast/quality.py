"""Is a series of prices fit to be forecast? One check after the other, the first that fails in one plain sentence."""

import warnings

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries, PriceWarning
from mambakit.forecast.splits import find_unadjusted_split, find_wrong_adjustment, tells_splits_from_crashes

# Below this standard deviation of daily log returns a series is a constant with rounding errors.
_SMALLEST_DEVIATION = 1e-8
# Weekdays without a price in a row. Exchanges close for a week or so (China's New Year, New York after 2001-09-11).
_LONGEST_GAP = 10
# Share of weekdays that are holidays where there are most of them.
_HOLIDAYS = 0.08


def validate_data_quality(
    prices: np.ndarray | PriceSeries,
    min_samples: int = 100,
    max_missing_ratio: float = 0.05,
    *,
    check_splits: bool = True,
) -> tuple[bool, str]:
    """Check prices (days,), or a series with its dates and volumes; return (is it usable, the reason in words).

    Looked for, in this order: too few samples, more than `max_missing_ratio` of them NaN, infinite values, prices
    that are not positive, and no movement at all; of a series also dates that are missing, twice there or out of
    order, gaps of more than ten weekdays, too many weekdays without a price, volumes or closes that can't be; and
    at last moves that look like a split which was not adjusted for. NaN within the ratio are left out of the later
    checks.

    A suspected split is what it is called. A real crash passes where its volume, its wild aftermath, or a source with
    both raw and adjusted closes shows it for one; `find_unadjusted_split` says what it can't tell, and
    `check_splits=False` leaves it out.
    """
    series = prices if isinstance(prices, PriceSeries) else None
    prices = np.asarray(prices, dtype=np.float64)
    problem = _problem_of_prices(prices, min_samples, max_missing_ratio)
    known = np.isfinite(prices)
    if problem is None and series is not None:
        series = series.take(known)
        problem = _problem_of_dates(series.dates, max_missing_ratio) or _problem_of_other_columns(series)
    if problem is None and check_splits:
        problem = _problem_of_splits(prices[known]) if series is None else _problem_of_adjustment(series)
    return problem is None, problem or "ok"


def require_quality(series: PriceSeries, min_samples: int, max_missing_ratio: float = 0.05) -> PriceSeries:
    """The series without the days that have no price, once it is long enough and nothing is wrong with it.

    Days without a price are left out and never filled: whatever would fill them was not known that day, or did not
    happen. A PriceWarning says how many. Raises DataError where more than `max_missing_ratio` are missing, or
    `validate_data_quality` has another reason.
    """
    usable, reason = validate_data_quality(series, min_samples, max_missing_ratio)
    if not usable:
        raise DataError(f"{series.symbol}: {reason}")
    missing = np.isnan(series.prices)
    if not missing.any():
        return series
    if len(series) - missing.sum() < min_samples:
        raise DataError(
            f"{series.symbol}: {len(series) - missing.sum()} days with a price are too few, "
            f"at least {min_samples} are needed"
        )
    first = series.dates[missing.argmax()]
    warnings.warn(
        f"{series.symbol}: {missing.sum()} of {len(series)} days have no price and are left out, the first {first}",
        PriceWarning,
        stacklevel=3,
    )
    return series.take(~missing)


def _problem_of_prices(prices: np.ndarray, min_samples: int, max_missing_ratio: float) -> str | None:
    if prices.ndim != 1:
        return f"prices must be one-dimensional, got shape {prices.shape}"
    if len(prices) < max(min_samples, 2):
        return f"{len(prices)} days of prices are too few, at least {max(min_samples, 2)} are needed"
    missing = np.isnan(prices)
    if missing.mean() > max_missing_ratio or missing.sum() > len(prices) - 2:
        return f"{missing.sum()} of {len(prices)} prices are missing (NaN), the first at row {missing.argmax()}"
    infinite = np.isinf(prices)
    if infinite.any():
        return f"{infinite.sum()} prices are infinite, the first at row {infinite.argmax()}"
    not_positive = prices <= 0
    if not_positive.any():
        row = not_positive.argmax()
        return f"{not_positive.sum()} prices are not positive, the first at row {row} ({prices[row]:g})"
    if np.diff(np.log(prices[~missing])).std() < _SMALLEST_DEVIATION:
        return "the prices do not move"
    return None


def _problem_of_dates(dates: np.ndarray, max_missing_ratio: float) -> str | None:
    days = dates.astype("datetime64[D]")
    if np.isnat(days).any():
        return f"{np.isnat(days).sum()} days have no date"
    steps = np.diff(days.astype(np.int64))
    if (steps == 0).any():
        return f"{days[(steps == 0).argmax()]} is there more than once; one price a day is expected"
    if (steps < 0).any():
        later = days[(steps < 0).argmax() + 1]
        return f"dates must increase, but {later} does not come after the date before it"
    skipped = np.busday_count(days[:-1] + 1, days[1:])  # weekdays between one price and the next
    longest = int(skipped.argmax())
    if skipped[longest] > _LONGEST_GAP:
        return f"no prices between {days[longest]} and {days[longest + 1]}, a gap of {skipped[longest]} weekdays"
    weekdays = int(np.busday_count(days[0], days[-1] + 1))
    absent = skipped.sum() / max(weekdays, 1)
    if absent > _HOLIDAYS + max_missing_ratio:
        return f"{absent:.0%} of the weekdays from {days[0]} to {days[-1]} have no price; one for every day is expected"
    return None


def _problem_of_other_columns(series: PriceSeries) -> str | None:
    """Volumes and closes as traded, where they are known."""
    wrong = np.isinf(series.volumes) | (series.volumes < 0)
    if wrong.any():
        return f"volumes must be finite and not negative, row {wrong.argmax()} is not"
    if series.closes is not None:
        wrong = np.isinf(series.closes) | (series.closes <= 0)
        if wrong.any():
            return f"closes as traded must be finite and positive, row {wrong.argmax()} is not"
    return None


def _problem_of_adjustment(series: PriceSeries) -> str | None:
    """Splits, with all that a series knows about them."""
    wrong = find_wrong_adjustment(series)
    if wrong is not None:
        return (
            f"the adjusted price moves by {wrong.change:+.1%} on {series.dates[wrong.row]}, where the close as traded "
            f"does not: a {wrong.ratio} split was adjusted for on the wrong day, or twice"
        )
    if tells_splits_from_crashes(series):
        return None
    return _problem_of_splits(series.prices, series.volumes, series.dates)


def _problem_of_splits(
    prices: np.ndarray, volumes: np.ndarray | None = None, dates: np.ndarray | None = None
) -> str | None:
    split = find_unadjusted_split(prices, volumes)
    if split is None:
        return None
    day = f"row {split.row}" if dates is None else dates[split.row]
    return (
        f"the move of {split.change:+.1%} on {day} looks like a {split.ratio} split that was not adjusted for; give "
        "adjusted closes, with volumes or the closes as traded beside them if the move was real"
    )
