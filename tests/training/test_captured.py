"""A batch's loss and gradients are the same captured or not."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambakit.training import captured
from mambakit.training.captured import CapturedGradients


class _Plainly:
    """`Replayed` without a GPU: what a graph would do again is done again."""

    def __init__(self) -> None:
        self.refused: dict[Any, str] = {}
        self.called: list[Any] = []

    def call(self, form: Any, function: Callable[[], object]) -> None:
        self.called.append(form)
        function()


def _model(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Tanh(), nn.Linear(4, 1)).to(device)


def _computed_by(model: nn.Module) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    def compute(batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        errors = model(batch["x"]).squeeze(-1) - batch["y"]
        loss = errors.square().mean()
        loss.backward()
        return loss, {"mae": errors.detach().abs().mean()}

    return compute


def _batches(sizes: list[int], device: str = "cpu") -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(size, 3).to(device), "y": torch.randn(size).to(device)} for size in sizes]


def _trained(model: nn.Module, gradients: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    found = []
    for batch in batches:
        loss, metrics = gradients(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # which changes the gradients at their place
        optimizer.step()
        found += [float(loss), float(metrics["mae"])]
    return found


def _uncaptured(model: nn.Module) -> Any:
    compute = _computed_by(model)

    def gradients(batch: dict[str, Tensor]) -> Any:
        model.zero_grad()
        return compute(batch)

    return gradients


def test_batches_are_copied_to_where_a_graph_reads_and_gradients_are_those_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captured, "Replayed", _Plainly)
    batches = _batches([5, 5, 2, 5, 2])
    model, other = _model(), _model()
    gradients = CapturedGradients(_computed_by(model), list(model.parameters()))
    assert _trained(model, gradients, batches) == _trained(other, _uncaptured(other), batches)
    replayed: Any = gradients._replayed
    assert len(replayed.called) == 5
    assert len(set(replayed.called)) == 2
    assert gradients.refused == []


def test_a_fifth_form_and_what_is_no_tensor_are_taken_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "Replayed", _Plainly)
    model = _model()
    gradients = CapturedGradients(_computed_by(model), list(model.parameters()))
    for batch in _batches([1, 2, 3, 4, 5, 5]):
        gradients(batch)
    gradients({**_batches([2])[0], "bounds": [0, 2]})
    replayed: Any = gradients._replayed
    assert len(replayed.called) == 4
    replayed.refused[replayed.called[0]] = "it waits for the device"
    gradients(_batches([1])[0])
    assert len(replayed.called) == 4
    assert gradients.refused == ["it waits for the device"]


@pytest.mark.gpu
def test_graphs_leave_what_plain_steps_leave() -> None:
    batches = _batches([5, 5, 5, 2, 5, 2, 2, 5, 2], "cuda")
    model, other = _model("cuda"), _model("cuda")
    gradients = CapturedGradients(_computed_by(model), list(model.parameters()))
    assert _trained(model, gradients, batches) == pytest.approx(_trained(other, _uncaptured(other), batches), rel=1e-5)
    assert len(gradients._replayed._graphs) == 2
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_batch_that_waits_for_the_device_is_taken_as_ever() -> None:
    model = _model("cuda")
    compute, waited = _computed_by(model), []

    def waits(batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        waited.append(batch["x"].sum().item())
        return compute(batch)

    gradients = CapturedGradients(waits, list(model.parameters()))
    with pytest.warns(UserWarning, match="goes kernel by kernel"):
        losses = [float(gradients(batch)[0]) for batch in _batches([4, 4], "cuda") * 3]
    assert len(gradients.refused) == 1
    assert losses[0] == losses[2] == losses[4]
    assert losses[1] == losses[5]
    torch.randn(2, device="cuda")  # still draws
