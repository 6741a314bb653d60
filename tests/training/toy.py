"""A regression small enough to be trained in milliseconds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ToyData:
    """y = x w + noise; `samples` rows, float64 so that equality means equality of the arithmetic."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
        noise = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64) + 0.1 * noise

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, /) -> dict[str, Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}


def toy_model(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()


def squared_error(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"absolute_error": error.abs().mean()}


def training_data() -> ToyData:
    return ToyData(22, seed=1)


def validation_data() -> ToyData:
    return ToyData(9, seed=2)
