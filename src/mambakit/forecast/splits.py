"""Splits of shares that nobody adjusted for: telling them from crashes, as far as prices and volumes can.

After a 2:1 split a share costs half of what it did, and no holder has lost anything. In a series that was not adjusted
for it, that is a return of -50% which never was. A crash can be as large: on 2000-09-29 AAPL lost 51.9%. Told apart by
what a crash has and a split has not:

    the size     a split's move is that of its ratio, 2:1, 3:2 or 1:10, but for what the share did that day
    the calm     it stands out by far from the days before it
    the trade    a crash is traded: 10 times the usual turnover on that day of AAPL's. Turnover is price * shares, so
                 that a split, which makes more shares of less each, leaves it as it was
    the echo     the days after a crash are wild, those after a split are like those before; where no volume is known
                 this has to decide alone

Where a source gives closes as traded beside adjusted ones, it has told splits from crashes itself: a move that both
make is believed.
"""

from typing import NamedTuple

import numpy as np

from mambakit.forecast.prices import PriceSeries

# Shares after the split for one before, or the other way round where they are put together (a reverse split).
RATIOS = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0)
_NAMES = {1.5: "3:2"}

_DAYS_BEFORE = 60  # what is usual is measured on
_LEAST_BEFORE = 10  # days without which nothing is known to be usual
_TRADE_BEFORE = 20
_ECHO_DAYS = 5

_STANDS_OUT = 8.0  # standard deviations of the days before; AAPL's and MSFT's splits had 14 to 32
_OWN_MOVE = 3.0  # standard deviations of what the share did on the day of its split
_LARGEST_OWN_MOVE = 0.10
_LARGEST_OWN_MOVE_UNTRADED = 0.05
_TRADED = 2.5  # times the usual turnover; 0.3 to 0.8 at those splits, 7 to 19 in the crashes of AAPL, META and NFLX
# Mean size of the returns after, against before. At the crashes of that size in skfolio's 20 series 1.3 to 3.9; seven
# in ten days drawn at random have less than 1.2.
_ECHO = 1.2
# Where volumes, too, say that it was a split; on 1987-10-19 MSFT lost 30% in the trade of any day, with an echo of 5.4.
_LOUD_ECHO = 2.5
_LARGE = 4.0  # such a ratio is hardly ever a crash's: a loud echo is asked for here as well


class SuspectedSplit(NamedTuple):
    """A move that looks like a split that was not adjusted for, or like one that was adjusted for wrongly."""

    row: int  # the first day at the new price
    change: float  # of the price, such as -0.5
    ratio: str  # such as "2:1"


def find_unadjusted_split(prices: np.ndarray, volumes: np.ndarray | None = None) -> SuspectedSplit | None:
    """The first move of prices (days,) that looks like a split; all prices must be positive.

    Args:
        volumes: (days,) shares, adjusted as the prices are; NaN where unknown.

    What it can't know: a split within ten days of the start; one of a share so restless that a third more or less
    is nothing out of the way; one whose day was traded like a crash; without volumes also one in the last days, and
    three in ten of the others, whose share happened to be livelier afterwards; and it takes a crash for a split
    that is of a split's size, and neither traded nor followed by restless days.
    """
    returns = np.diff(np.log(prices))
    for place in np.flatnonzero(np.abs(returns) > np.log(RATIOS[0]) - _LARGEST_OWN_MOVE):
        if (ratio := _split_at(returns, int(place), prices, volumes)) is not None:
            return SuspectedSplit(int(place) + 1, float(np.expm1(returns[place])), ratio)
    return None


def find_wrong_adjustment(series: PriceSeries) -> SuspectedSplit | None:
    """The first day on which the adjusted price moves by a split's ratio, and the close as traded hardly at all."""
    if series.closes is None:
        return None
    adjusted, traded = np.diff(np.log(series.prices)), np.diff(np.log(series.closes))
    for place in np.flatnonzero(np.abs(adjusted) > np.log(RATIOS[0]) - _LARGEST_OWN_MOVE):
        ratio, distance = _nearest(adjusted[place])
        factor_too = _nearest(adjusted[place] - traded[place])
        if distance < _LARGEST_OWN_MOVE and factor_too[0] == ratio and factor_too[1] < 0.01:
            return SuspectedSplit(int(place) + 1, float(np.expm1(adjusted[place])), _name(ratio, adjusted[place]))
    return None


def tells_splits_from_crashes(series: PriceSeries) -> bool:
    """Whether the source gives closes as traded and, beside them, prices that are adjusted in some way."""
    if series.closes is None:
        return False
    factor = series.prices / series.closes
    return bool(np.nanmax(factor) - np.nanmin(factor) > 1e-3 * np.nanmax(factor))


def _split_at(returns: np.ndarray, place: int, prices: np.ndarray, volumes: np.ndarray | None) -> str | None:
    before = returns[max(0, place - _DAYS_BEFORE) : place]
    deviation = float(before.std()) if len(before) >= _LEAST_BEFORE else 0.0
    ratio, distance = _nearest(returns[place])
    if deviation == 0.0 or abs(returns[place]) < _STANDS_OUT * deviation or distance > _OWN_MOVE * deviation:
        return None
    turnover = None if volumes is None else _turnover_against_usual(prices * volumes, place + 1)
    after = returns[place + 1 : place + 1 + _ECHO_DAYS]
    echo = float(np.abs(after).mean() / np.abs(before).mean()) if len(after) else None
    if turnover is not None:
        split = distance < _LARGEST_OWN_MOVE and turnover < _TRADED and (echo is None or echo < _LOUD_ECHO)
    else:
        loudest = _ECHO if ratio < _LARGE else _LOUD_ECHO
        split = (
            distance < _LARGEST_OWN_MOVE_UNTRADED and len(after) == _ECHO_DAYS and echo is not None and echo < loudest
        )
    return _name(ratio, returns[place]) if split else None


def _nearest(move: float) -> tuple[float, float]:
    """The ratio that is nearest to a move of the log price, up or down, and how far off it is, as a log."""
    distances = np.abs(np.abs(move) - np.log(RATIOS))
    return RATIOS[int(distances.argmin())], float(distances.min())


def _name(ratio: float, move: float) -> str:
    name = _NAMES.get(ratio, f"{ratio:g}:1")
    return name if move < 0 else ":".join(reversed(name.split(":")))


def _turnover_against_usual(turnover: np.ndarray, day: int) -> float | None:
    """The day's turnover against the median of the days before; None where they are not known, or not traded."""
    before = turnover[max(0, day - _TRADE_BEFORE) : day]
    usual = float(np.median(before))
    return float(turnover[day]) / usual if np.isfinite(turnover[day]) and np.isfinite(usual) and usual > 0 else None
