"""Samples altered at random, so that a network can't learn the few it has by heart.

Three alterations, each as strong as its parameter says, 0 leaving it out. A sample x (length, columns) that is altered
becomes, by column c with mean m_c and standard deviation s_c over all samples,

    noise      x + noise * s_c * e                e ~ N(0, 1) for each value
    warping    m_c + (x - m_c) * w_c(t)           w_c a cubic spline through knots ~ N(1, warp)
    dropout    m_c for the whole window           with probability `dropout` for each column

Targets stay: what was to be forecast has not changed. Source of the first two: Um et al., Data augmentation of
wearable sensor data (2017); the third is dropout on whole features, as on any input.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mambakit.errors import DataError

_AT_ONCE = 512  # samples, so that what is drawn takes little memory beside the result


class DataAugmentor:
    """Alters a share of the samples.

    Args:
        augmentation_rate: probability that a sample is altered; the others stay as they are, bit for bit.
        noise: in standard deviations of each column.
        warp: standard deviation of the factor at each knot.
        knots: of the spline, spread evenly over the window, 4 or more.
        dropout: probability that an altered sample loses a column.
        seed: fixes all draws of `augment`. Each call draws anew: two augmentors of one seed give the same sequence of
            results, two calls of one augmentor don't.

    Raises DataError where a parameter is out of its range.

    Example::

        X, y = SequenceGenerator().generate_sequences(features, prices)
        X_aug, y_aug = DataAugmentor(augmentation_rate=0.5).augment(X, y)
    """

    def __init__(
        self,
        augmentation_rate: float = 0.5,
        *,
        noise: float = 0.05,
        warp: float = 0.1,
        knots: int = 4,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in (("augmentation_rate", augmentation_rate), ("dropout", dropout)):
            if not 0.0 <= value <= 1.0:
                raise DataError(f"{name} must be a probability from 0 to 1, got {value}")
        for name, value in (("noise", noise), ("warp", warp)):
            if not 0.0 <= value < np.inf:
                raise DataError(f"{name} must be 0 or more, got {value}")
        if knots < 4:
            raise DataError(f"knots must be 4 or more, as a cubic spline needs, got {knots}")
        self.augmentation_rate = augmentation_rate
        self.noise, self.warp, self.knots, self.dropout = noise, warp, knots, dropout
        self.seed = seed
        self._generator = np.random.default_rng(seed)

    def augment(self, X: np.ndarray, y: dict[int, np.ndarray]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Samples X (samples, length, columns) and targets y {horizon: (samples, 1)}, with some samples altered.

        Returns new arrays of the same shapes and order: an altered sample takes the place of the original, which is
        not kept beside it (for both, concatenate them). X and y themselves are never changed.

        Give training samples alone: the means and deviations of the columns are measured on X.

        Raises DataError where shapes don't fit, or X or y hold NaN or infinite values.
        """
        X = np.asarray(X)
        _check(X, y)
        altered: np.ndarray = X.astype(X.dtype if X.dtype.kind == "f" else np.float64)  # a copy, also of a view
        targets = {horizon: np.array(target) for horizon, target in y.items()}
        chosen = np.flatnonzero(self._generator.random(len(X)) < self.augmentation_rate)
        if len(chosen):
            mean, deviation = X.mean(axis=(0, 1), dtype=np.float64), X.std(axis=(0, 1), dtype=np.float64)
            for start in range(0, len(chosen), _AT_ONCE):
                rows = chosen[start : start + _AT_ONCE]
                altered[rows] = self._alter(X[rows], mean, deviation)
        return altered, targets

    def augment_batch(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`augment` for a batch of standardised features (batch, length, columns), on its own device, as cheap as
        a few elementwise operations: for use inside a training step.

        The columns count as having mean 0 and deviation 1. NaN are not looked for. Draws come from `generator` (on
        the device of the features), or torch's own; not from `seed`.
        """
        batch, length, columns = features.shape

        def draw(*shape: int, normal: bool = True) -> Tensor:
            make = torch.randn if normal else torch.rand
            return make(shape, generator=generator, device=features.device, dtype=features.dtype)

        altered = features
        if self.warp:
            basis = torch.from_numpy(spline_basis(length, self.knots)).to(features)
            altered = altered * (
                1.0 + self.warp * (basis @ draw(batch, self.knots, columns))
            )  # (batch, length, columns)
        if self.noise:
            altered = altered + self.noise * draw(batch, length, columns)
        if self.dropout:
            altered = altered * (draw(batch, 1, columns, normal=False) >= self.dropout)
        chosen = draw(batch, 1, 1, normal=False) < self.augmentation_rate
        return torch.where(chosen, altered, features)

    def _alter(self, X: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Every sample of X (some, length, columns), altered, float64."""
        some, length, columns = X.shape
        distance = X - mean
        if self.warp:
            factors = self._generator.standard_normal((some, self.knots, columns))
            distance *= 1.0 + self.warp * (spline_basis(length, self.knots) @ factors)
        if self.noise:
            distance += self.noise * deviation * self._generator.standard_normal(X.shape)
        if self.dropout:
            distance *= self._generator.random((some, 1, columns)) >= self.dropout
        return mean + distance


@lru_cache(maxsize=16)
def spline_basis(length: int, knots: int) -> np.ndarray:
    """What each knot of a cubic spline over `length` rows adds to each row: (length, knots).

    A spline is linear in its values at the knots, so that drawing one is a product with this matrix.
    """
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(np.linspace(0.0, 1.0, knots), np.eye(knots))
    return spline(np.linspace(0.0, 1.0, length))


def _check(X: np.ndarray, y: dict[int, np.ndarray]) -> None:
    if X.ndim != 3:
        raise DataError(f"X must be (samples, length, columns), got shape {X.shape}")
    for horizon, target in y.items():
        if len(target) != len(X):
            raise DataError(f"y[{horizon}] has {len(target)} targets for {len(X)} samples")
        if not np.isfinite(target).all():
            raise DataError(f"y[{horizon}] must be finite, sample {(~np.isfinite(target)).argmax()} is not")
    finite = np.isfinite(X).all(axis=(1, 2))
    if not finite.all():
        raise DataError(f"X must be finite, sample {(~finite).argmax()} is not; leave out rows before the warm-up")
