"""Features of a tick from the ticks before it: 13 numbers for each input.

    raw           x_t
    delta         x_t - x_{t-1}                      0 at the first tick
    acceleration  delta_t - delta_{t-1}              0 at the first tick
    mean w        of the last w ticks, w = 3, 5, 10, 20
    deviation w   of the last w ticks, w = 5, 10, 20 (population)
    average a     e_t = a x_t + (1 - a) e_{t-1}, e_0 = x_0, a = 0.1, 0.3, 0.5

A window at the start of a sequence holds the ticks that there are. Sums are float64, results float32.
"""

from collections.abc import Callable, Iterable

import numpy as np

MEANS = (3, 5, 10, 20)
DEVIATIONS = (5, 10, 20)
AVERAGES = (0.1, 0.3, 0.5)
FEATURES_PER_INPUT = 3 + len(MEANS) + len(DEVIATIONS) + len(AVERAGES)
_LONGEST = MEANS[-1]
_WIDTHS = np.array(MEANS)
_DEVIATING = np.array([MEANS.index(width) for width in DEVIATIONS])  # every deviation has a mean of its width


def feature_names(inputs: Iterable[str]) -> list[str]:
    """Names of the features of the inputs with these names, in the order of the columns."""
    inputs = list(inputs)
    kinds = [
        "raw",
        "delta",
        "acceleration",
        *(f"mean_{w}" for w in MEANS),
        *(f"deviation_{w}" for w in DEVIATIONS),
        *(f"average_{a}" for a in AVERAGES),
    ]
    return [f"{name}_{kind}" for kind in kinds for name in inputs]


class FeatureEngineer:
    """Features tick by tick, or of whole sequences at once; the two agree to rounding.

    Args:
        inputs: numbers in a state.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.outputs = FEATURES_PER_INPUT * inputs
        self._averages = np.array(AVERAGES)[:, None]  # (3, 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new sequence begins."""
        self._past = np.zeros((2 * _LONGEST, self.inputs))  # the last ticks, twice as many as needed: see `update`
        self._end = 0  # where in it the next tick goes
        self._count = 0
        self._delta = np.zeros(self.inputs)
        self._average = np.zeros((len(AVERAGES), self.inputs))

    def update(self, state: np.ndarray) -> np.ndarray:
        """Take the next state (inputs,) and return its features (13 inputs,) float32."""
        x = np.asarray(state, dtype=np.float64)
        if self._end == len(self._past):  # move what is still needed to the front, once in twenty ticks
            self._past[:_LONGEST] = self._past[_LONGEST:]
            self._end = _LONGEST
        self._past[self._end] = x
        self._end += 1
        out = np.empty((FEATURES_PER_INPUT, self.inputs))
        out[0] = x
        if self._count == 0:
            out[1:3] = 0.0
            self._average[:] = x
        else:
            np.subtract(x, self._past[self._end - 2], out=out[1])
            np.subtract(out[1], self._delta, out=out[2])
            self._average += self._averages * (x - self._average)
        self._delta = out[1]
        self._count += 1
        # Sums of all windows at once: along the ticks, the newest first, and of squares about a centre, so that what
        # is subtracted from them is small.
        window = self._past[max(self._end - self._count, self._end - _LONGEST) : self._end][::-1]
        counts = np.minimum(_WIDTHS, self._count)
        means = np.add.accumulate(window, axis=0)[counts - 1] / counts[:, None]
        out[3 : 3 + len(MEANS)] = means
        centre = means[-1]
        window = window - centre
        squares = np.add.accumulate(window * window, axis=0)[counts[_DEVIATING] - 1] / counts[_DEVIATING, None]
        away = means[_DEVIATING] - centre
        out[3 + len(MEANS) : -len(AVERAGES)] = np.sqrt(np.maximum(squares - away * away, 0.0))
        out[-len(AVERAGES) :] = self._average
        return out.astype(np.float32).ravel()

    def transform(self, states: np.ndarray) -> np.ndarray:
        """Features (..., steps, 13 inputs) float32 of whole sequences (..., steps, inputs)."""
        x = np.asarray(states, dtype=np.float64)
        if x.shape[-1] != self.inputs:
            raise ValueError(f"states must have {self.inputs} inputs, got {x.shape[-1]}")
        delta, acceleration = np.zeros_like(x), np.zeros_like(x)
        delta[..., 1:, :] = x[..., 1:, :] - x[..., :-1, :]
        acceleration[..., 1:, :] = delta[..., 1:, :] - delta[..., :-1, :]
        means, deviations = _rolling(x)
        parts = [x, delta, acceleration, *means, *deviations, *(_average(x, a) for a in AVERAGES)]
        return np.concatenate([part.astype(np.float32) for part in parts], axis=-1)


def _rolling(x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Means and deviations of the last ticks at each step of (..., steps, inputs)."""
    steps = x.shape[-2]
    counts = {width: np.minimum(np.arange(1, steps + 1), width)[:, None] for width in MEANS}
    means = {width: _summed(lambda back, _: _shifted(x, back), width, x.shape) / counts[width] for width in counts}

    def square(back: int, width: int) -> np.ndarray:
        # Past the start of the sequence there is nothing, not a zero.
        there = np.arange(steps)[:, None] >= back
        return np.where(there, _shifted(x, back) - means[width], 0.0) ** 2

    deviations = [np.sqrt(_summed(square, width, x.shape) / counts[width]) for width in DEVIATIONS]
    return [means[width] for width in MEANS], deviations


def _summed(term: Callable[[int, int], np.ndarray], width: int, shape: tuple[int, ...]) -> np.ndarray:
    total = np.zeros(shape)
    for back in range(width):
        total += term(back, width)
    return total


def _shifted(x: np.ndarray, back: int) -> np.ndarray:
    """x `back` steps earlier, zeros before the first."""
    if back == 0:
        return x
    out = np.zeros_like(x)
    out[..., back:, :] = x[..., :-back, :]
    return out


def _average(x: np.ndarray, a: float) -> np.ndarray:
    out = np.empty_like(x)
    current = out[..., 0, :] = x[..., 0, :]
    for step in range(1, x.shape[-2]):
        current = current + a * (x[..., step, :] - current)
        out[..., step, :] = current
    return out
