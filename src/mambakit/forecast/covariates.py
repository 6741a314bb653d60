"""What else is known of a day: the calendar, also that of the day to be forecast, and what an index did.

Each function gives named columns, a row for every day of a series, to be appended to its features. No row depends on a
later day: neither on its date, which can't be known for sure, nor on a price.

The calendar of a day t that is h trading days ahead is that of the h-th weekday after t, holidays left out where they
are given. They are not read from the series: a day that turned out to be closed need not have been announced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mambakit.errors import DataError
from mambakit.forecast.prices import PriceSeries

WEEKDAYS = "1111100"  # Monday to Friday
TURN_OF_MONTH = 3  # trading days on either side of the first of a month


class Covariates(NamedTuple):
    """Columns for the days of a series."""

    names: tuple[str, ...]
    values: np.ndarray  # (days, columns) float64

    @property
    def known(self) -> np.ndarray:
        """(days,) whether every column has a value."""
        return np.isfinite(self.values).all(axis=1)


def calendar_covariates(
    dates: np.ndarray,
    horizons: Sequence[int] = (),
    *,
    holidays: Sequence[str] | np.ndarray = (),
    weekmask: str = WEEKDAYS,
) -> Covariates:
    """The calendar of each day, and of the day that each horizon reaches.

    Args:
        dates: (days,) datetime64, increasing.
        horizons: trading days ahead, such as (1, 5, 10, 30).
        holidays: days without trade that were known in advance; without them a holiday counts as a trading day.
        weekmask: which days of the week are traded, from Monday, as numpy.busdaycalendar has it; "1111111" for what is
            traded every day.

    Columns of day t: `day_of_week_sin`, `_cos` (a turn is a week), `month_sin`, `_cos` (a turn is a year, by the day
    in it), `turn_of_month` (1 within three trading days of the first of a month, else 0) and `days_since_last`,
    the log of the calendar days since the day before it in the series (0 after one day; NaN on the first).
    For each horizon h the same with `_ahead_h` behind the name, but for the last: `days_ahead_h` is the log of the
    calendar days from t to the target, against h * 7 / 5.

    Raises DataError where dates do not increase, a horizon is below 1, or holidays or weekmask are none.
    """
    days = _increasing(dates)
    wrong = [horizon for horizon in horizons if horizon < 1]
    if wrong:
        raise DataError(f"horizons must be 1 or more trading days, got {wrong[0]}")
    try:
        traded = np.busdaycalendar(weekmask, np.asarray(holidays, dtype="datetime64[D]"))
    except ValueError as error:
        raise DataError(f"holidays must be dates and weekmask seven of 0 and 1 such as 1111100: {error}") from error
    since_last = np.full(len(days), np.nan)
    since_last[1:] = np.log(np.diff(days.astype(np.int64)))
    columns = {**_place_in_calendar(days, traded), "days_since_last": since_last}
    week = traded.weekmask.sum() / 7
    for horizon in horizons:
        target = np.busday_offset(days, horizon, roll="backward", busdaycal=traded)
        place = _place_in_calendar(target, traded)
        columns |= {f"{name}_ahead_{horizon}": values for name, values in place.items()}
        columns[f"days_ahead_{horizon}"] = np.log((target - days).astype(np.int64) / (horizon / week))
    return Covariates(tuple(columns), np.stack(list(columns.values()), axis=1))


def index_return_covariates(
    dates: np.ndarray,
    index: PriceSeries,
    windows: Sequence[int] = (1, 5, 20),
    *,
    lag: int = 0,
    longest_gap: int = 10,
) -> Covariates:
    """Log returns of an index, or of any other series, up to each day.

    The index on a day is its last price known that day: where it has none of its own, the one before is carried
    forward. A return over n days is between its values today and n days of `dates` ago.

    Args:
        dates: (days,) datetime64, increasing.
        index: whose returns.
        windows: days of each return.
        lag: calendar days that the index comes late; 1 where its exchange closes after that of the series.
        longest_gap: calendar days for which a price may be carried forward.

    Columns: `<symbol>_return_<n>`, NaN where the index had not begun n days before.

    Raises DataError where dates do not increase, a window is below 1, the lag is negative, the index has a price that
    is not positive and finite, does not overlap, or stays without a price for longer than `longest_gap`, be it
    within `dates` or at their end.
    """
    days = _increasing(dates)
    if lag < 0:
        raise DataError(f"lag must be 0 or more days, got {lag}: an index is never known before its day")
    if not windows or min(windows) < 1:
        raise DataError(f"windows must be 1 or more days each, got {list(windows)}")
    if not (np.isfinite(index.prices).all() and (index.prices > 0).all()):
        raise DataError(f"the prices of {index.symbol} must be positive and finite to give returns")
    known_on = _increasing(index.dates) + lag
    last = np.searchsorted(known_on, days, side="right") - 1  # the newest price known on each day; -1 before the first
    begun = last >= 0
    if not begun.any():
        raise DataError(f"{index.symbol} begins on {index.dates[0]}, after the last of these days, {days[-1]}")
    age = np.where(begun, (days - known_on[last]).astype(np.int64), 0)
    if age.max() > longest_gap:
        day = days[age.argmax()]
        raise DataError(
            f"{index.symbol} has no price for the {age[age.argmax()]} days before {day}, at most {longest_gap} are "
            "carried forward; fetch it for the same days"
        )
    logs = np.where(begun, np.log(index.prices)[last], np.nan)
    columns = {}
    for window in windows:
        column = np.full(len(days), np.nan)
        column[window:] = logs[window:] - logs[:-window]
        columns[f"{index.symbol.lstrip('^').lower()}_return_{window}"] = column
    return Covariates(tuple(columns), np.stack(list(columns.values()), axis=1))


def append_covariates(
    features: np.ndarray, names: Sequence[str], *covariates: Covariates
) -> tuple[np.ndarray, list[str]]:
    """Features (days, columns) and their names with the covariates' columns to the right of them.

    Raises DataError where a covariate has another number of days, or a name is there twice.
    """
    every = [*names, *(name for each in covariates for name in each.names)]
    twice = next((name for name in every if every.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {twice}")
    for each in covariates:
        if len(each.values) != len(features):
            raise DataError(f"{each.names[0]} has {len(each.values)} days, the features have {len(features)}")
    return np.concatenate([features, *(each.values for each in covariates)], axis=1), every


def _increasing(dates: np.ndarray) -> np.ndarray:
    days = np.asarray(dates, dtype="datetime64[D]")
    if not len(days) or np.isnat(days).any() or (np.diff(days.astype(np.int64)) <= 0).any():
        raise DataError("dates must be there, and each after the one before")
    return days


def _place_in_calendar(days: np.ndarray, traded: np.busdaycalendar) -> dict[str, np.ndarray]:
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    year = days.astype("datetime64[Y]")
    in_year = (days - year.astype("datetime64[D]")).astype(np.int64)
    days_of_year = ((year + 1).astype("datetime64[D]") - year.astype("datetime64[D]")).astype(np.int64)
    week, season = 2 * np.pi * weekday / 7, 2 * np.pi * in_year / days_of_year
    first = days.astype("datetime64[M]").astype("datetime64[D]")
    next_first = (days.astype("datetime64[M]") + 1).astype("datetime64[D]")
    into = np.busday_count(first, days, busdaycal=traded)  # trading days of this month before today
    left = np.busday_count(days, next_first, busdaycal=traded)  # until it ends, today among them
    return {
        "day_of_week_sin": np.sin(week),
        "day_of_week_cos": np.cos(week),
        "month_sin": np.sin(season),
        "month_cos": np.cos(season),
        "turn_of_month": ((into < TURN_OF_MONTH) | (left <= TURN_OF_MONTH)).astype(np.float64),
    }
