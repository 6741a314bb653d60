"""Linear probes: what can be read off states, or any other intermediate, by a linear map.

    W = argmin ||X W - Y||^2 + ridge ||W||^2 = (X^T X + ridge I)^-1 X^T Y

with X and Y centred and X scaled, in float64. A class is fitted as a column of ones and zeros, and the largest wins.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.errors import DataError


@dataclass(frozen=True)
class Probe:
    """A fitted linear map.

    Attributes:
        weight: (features, outputs).
        bias: (outputs,).
        classes: whether outputs are scores of classes.
    """

    weight: Tensor
    bias: Tensor
    classes: bool

    def predict(self, features: Tensor) -> Tensor:
        """Of (examples, ...) the classes (examples,), or the values (examples, outputs)."""
        scores = _flat(features) @ self.weight + self.bias
        return scores.argmax(-1) if self.classes else scores

    def score(self, features: Tensor, targets: Tensor) -> float:
        """The share of classes that are right, or R^2, the share of the targets' variance that is explained.

        Score on examples that the probe was not fitted to: with more features than examples a fit is always perfect.
        """
        predicted = self.predict(features)
        if self.classes:
            return (predicted == targets.to(predicted.device)).double().mean().item()
        truth = _columns(targets)
        left = (truth - predicted).square().sum()
        return 1.0 - (left / (truth - truth.mean(0)).square().sum()).item()


def fit_probe(features: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> Probe:
    """Fit a probe in closed form.

    Args:
        features: (examples, ...), for instance `cache["layers.0.mixer.states"][:, -1]`.
        targets: integers (examples,) for classes, or numbers (examples,) or (examples, outputs).
        ridge: the penalty, in units of the number of examples.

    Raises DataError for fewer than two examples, other lengths, or what is not finite.

    >>> states, classes = torch.randn(200, 8, 4), torch.randint(3, (200,))
    >>> fit_probe(states, classes).score(torch.randn(50, 8, 4), torch.randint(3, (50,))) < 0.7
    True
    """
    X = _flat(features.detach())
    if X.shape[0] < 2 or X.shape[0] != targets.shape[0]:
        raise DataError(f"a probe needs two examples or more, a target each: got {X.shape[0]} and {targets.shape[0]}")
    if ridge <= 0:
        raise DataError(f"ridge must be positive, got {ridge}")
    classes = not targets.is_floating_point()
    if classes and (targets.dim() != 1 or targets.min() < 0):
        raise DataError(f"classes must be (examples,) and not negative, got {tuple(targets.shape)}")
    Y = F.one_hot(targets.long()).double().to(X.device) if classes else _columns(targets)
    if not (X.isfinite().all() and Y.isfinite().all()):
        raise DataError("features and targets must be finite")
    centre, spread = X.mean(0), X.std(0)
    scale = torch.where(spread > 0, spread, 1.0)
    Z, mean = (X - centre) / scale, Y.mean(0)
    by_features = Z.shape[1] <= Z.shape[0]  # otherwise the same by a matrix of the examples' size
    gram = Z.mT @ Z if by_features else Z @ Z.mT
    gram = gram + ridge * X.shape[0] * torch.eye(len(gram), dtype=X.dtype, device=X.device)
    weight = torch.linalg.solve(gram, Z.mT @ (Y - mean)) if by_features else Z.mT @ torch.linalg.solve(gram, Y - mean)
    weight = weight / scale[:, None]
    return Probe(weight, mean - centre @ weight, classes)


def _flat(features: Tensor) -> Tensor:
    return features.detach().flatten(1).double() if features.dim() > 1 else features.detach()[:, None].double()


def _columns(targets: Tensor) -> Tensor:
    return targets.detach().double().reshape(targets.shape[0], -1)
