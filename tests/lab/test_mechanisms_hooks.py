"""The hooked path beside the fused one, for every mixer; names, replacements and refusals."""

from typing import Any

import pytest
import torch
from tests.lab.mechanism_models import CASES, GENERATIONS, LENGTH, Classifier, backbone, edited, hidden, tokens
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mambakit.errors import DataError
from mambakit.lab.mechanisms import hook_names, hooked, patch, run_with_cache, run_with_hooks
from mambakit.nn import Backbone, Mamba2, Mamba3

POINTS = {"mamba": 14, "mamba2": 14, "mamba3": 15}


@pytest.mark.parametrize("case", CASES)
def test_the_hooked_path_gives_what_the_fused_one_does(case: str) -> None:
    model, x = backbone(case), hidden()
    expected, expected_state = model(x)
    (y, state), cache = run_with_cache(model, x, ["*", "layers.*.mixer.states", "layers.*.mixer.mixing"])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(tree_leaves(state), tree_leaves(expected_state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert set(cache) == set(hook_names(model))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("point", ["states", "mixing", "decay"])
def test_every_way_to_run_the_scan_gives_what_the_operation_does(case: str, point: str) -> None:
    model, x = backbone(case), hidden()
    expected, expected_state = model(x)
    y, state = run_with_hooks(model, x, {f"layers.*.mixer.{point}": torch.clone})
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    if point != "mixing":
        for ours, theirs in zip(tree_leaves(state), tree_leaves(expected_state), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_the_hooked_path_are_those_of_the_fused_one(case: str) -> None:
    model, x = backbone(case, layers=1), hidden().requires_grad_()
    weights = torch.randn(2, LENGTH, 8, dtype=torch.float64)
    targets = [x, *model.parameters()]
    expected = torch.autograd.grad((model(x)[0] * weights).sum(), targets)
    for names in ("*.x", "*.mixing", "*.states"):
        found = run_with_hooks(model, x, {f"layers.0.mixer{names[1:]}": torch.clone})[0]
        for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), targets), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_run_carries_on_from_the_state_of_another(case: str) -> None:
    model, x = backbone(case), hidden()
    expected, _ = model(x)
    _, state = model(x[:, :3])
    (y, _), _ = run_with_cache(model, x[:, 3:], state=state)
    torch.testing.assert_close(y, expected[:, 3:], rtol=0, atol=1e-10)
    y, _ = run_with_hooks(model, x[:, 3:], {"layers.*.mixer.states": torch.clone}, state=state)
    torch.testing.assert_close(y, expected[:, 3:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", GENERATIONS)
def test_packed_sequences_run_through_the_hooks(case: str) -> None:
    model, x, bounds = backbone(case), hidden(batch=1), torch.tensor([0, 3, LENGTH])
    expected, _ = model(x, cu_seqlens=bounds)
    (y, _), _ = run_with_cache(model, x, cu_seqlens=bounds)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    with pytest.raises(DataError, match="neither packed nor empty"):
        run_with_cache(model, x, "layers.0.mixer.mixing", cu_seqlens=bounds)


@pytest.mark.parametrize("case", GENERATIONS)
def test_the_kept_tensors_stand_in_the_graph_of_the_run(case: str) -> None:
    model = backbone(case)
    (y, _), cache = run_with_cache(model, hidden(), "layers.0.*")
    for name, tensor in cache.items():
        gradient = torch.autograd.grad(y.square().sum(), tensor, retain_graph=True, allow_unused=True)[0]
        if name.endswith("decay"):  # shown beside the operation, which makes its own
            assert gradient is None
        else:
            assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("case", CASES)
def test_each_replaced_intermediate_changes_the_output_from_its_position_on(case: str) -> None:
    model, x = backbone(case), hidden()
    expected, _ = model(x)
    for name in hook_names(model):
        if name.endswith("mixing"):
            continue

        def change(tensor: Tensor) -> Tensor:
            tensor[:, 4] += 0.1
            return tensor

        y = run_with_hooks(model, x, {name: edited(change)})[0]
        torch.testing.assert_close(y[:, :4], expected[:, :4], rtol=0, atol=1e-12)
        assert (y[:, 4:] - expected[:, 4:]).abs().max() > 1e-6, name


@pytest.mark.parametrize("case", GENERATIONS)
def test_every_tensor_patched_from_another_run_gives_that_run(case: str) -> None:
    model, ours, theirs = Classifier(backbone(case)), tokens(), tokens()
    expected, cache = run_with_cache(model, theirs, ["*", "layers.*.mixer.mixing"])
    assert (model(ours) - expected).abs().max() > 1e-3
    for names in (
        "embedded",
        "final",
        "layers.1.residual",
        ["layers.1.mixer.output", "layers.1.mlp.output", "embedded"],
    ):
        torch.testing.assert_close(patch(model, ours, cache, names), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", GENERATIONS)
def test_a_decay_of_zero_cuts_the_past_off(case: str) -> None:
    model, x = backbone(case, layers=1), hidden()

    def cut(decay: Tensor) -> Tensor:
        decay[:, 4] = 0.0
        return decay

    other = x.clone()
    other[:, 0] = -other[:, 0]  # beyond the reach of a convolution of four taps
    y, z = (run_with_hooks(model, v, {"layers.0.mixer.decay": edited(cut)})[0] for v in (x, other))
    torch.testing.assert_close(y[:, 4:], z[:, 4:], rtol=0, atol=1e-12)
    assert (model(x)[0][:, 4:] - model(other)[0][:, 4:]).abs().max() > 1e-6


def test_an_edit_in_place_counts_as_a_replacement() -> None:
    model, x = backbone("mamba2"), hidden()

    def close(matrix: Tensor) -> None:
        with torch.no_grad():
            matrix.zero_()

    with torch.no_grad():
        y = run_with_hooks(model, x, {"layers.0.mixer.mixing": close})[0]
        assert (y - model(x)[0]).abs().max() > 1e-6


def test_hooks_are_gone_after_the_run_and_after_an_error() -> None:
    model, x = backbone("mamba"), hidden()
    expected, _ = model(x)

    def fail(tensor: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_with_hooks(model, x, {"layers.1.mixer.x": fail, "layers.*.residual": torch.zeros_like})
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)
    assert all(not callable(value) for layer in model.layers for value in layer.mixer.__dict__.values())


def test_names_are_counted_and_in_the_order_of_the_run() -> None:
    for case in GENERATIONS:
        model = backbone(case)
        names = hook_names(model)
        assert len(names) == 2 + 2 * (POINTS[case] + 2)
        _, cache = run_with_cache(model, hidden())
        assert list(cache) == [name for name in names if name.rsplit(".", 1)[-1] not in ("states", "mixing")]


def test_layers_of_other_mixers_show_what_enters_and_leaves_them() -> None:
    options = {"mamba2": {"d_state": 3, "headdim": 8}, "attention": {"n_heads": 2}, "s4d": {"d_state": 4}}
    model = Backbone(8, 3, ["mamba2", "attention", "s4d"], options, dtype=torch.float64)
    x = hidden()
    (y, _), cache = run_with_cache(model, x)
    torch.testing.assert_close(y, model(x)[0], rtol=0, atol=1e-12)
    assert [name for name in cache if name.startswith("layers.1")] == [
        "layers.1.mixer.input",
        "layers.1.mixer.output",
        "layers.1.residual",
    ]
    zeroed = run_with_hooks(model, x, {"layers.2.mixer.output": torch.zeros_like})[0]
    torch.testing.assert_close(zeroed, model.norm_f(cache["layers.1.residual"]), rtol=0, atol=1e-12)


class Convolved(Mamba3):
    """A Mamba-3 with a convolution before its scan."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.taps = torch.nn.Parameter(torch.tensor([0.5, 0.25]))

    def convolve(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, None]:
        return self.taps[0] * x + self.taps[1] * torch.nn.functional.pad(x, (0, 0, 1, -1)), None

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        projected, _ = self.convolve(self.in_proj(x), None, cu_seqlens)
        return self.mix(projected, state, cu_seqlens)


class Doubled(Mamba2):
    """A Mamba-2 with another convolution."""

    def convolve(self, xBC: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = super().convolve(xBC, state, cu_seqlens)
        return y + xBC, state


@pytest.mark.parametrize("mixer", [Convolved, Doubled])
def test_subclasses_with_a_convolution_of_their_own_are_taken_apart_as_they_are(mixer: type) -> None:
    model = Backbone(8, 2, mixer, {"d_state": 4, "headdim": 4}, dtype=torch.float64)
    x = hidden()
    (y, _), cache = run_with_cache(model, x, ["*", "layers.*.mixer.mixing"])
    torch.testing.assert_close(y, model(x)[0], rtol=0, atol=1e-10)
    assert "layers.1.mixer.convolved" in cache
    zeroed = run_with_hooks(model, x, {"layers.*.mixer.convolved": torch.zeros_like})[0]
    assert (zeroed - y).abs().max() > 1e-6
    torch.testing.assert_close(model(x)[0], y, rtol=0, atol=1e-10)


class Truncated(torch.nn.Module):
    """A model that leaves its last layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = backbone("mamba")

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.norm_f(self.stack.layers[0](x)[0])


def test_a_hook_that_no_part_of_the_run_comes_by_is_an_error() -> None:
    model = Truncated()
    run_with_hooks(model, hidden(), {"layers.0.residual": torch.clone})
    with pytest.raises(DataError, match=r"layers\.1\.mixer\.input never came up"):
        run_with_cache(model, hidden())
    with pytest.raises(DataError, match=r"before torch\.compile"):
        run_with_cache(torch.compile(model), hidden())


@pytest.mark.parametrize("case", GENERATIONS)
def test_half_precision_runs_through_the_hooks_with_its_own_rounding(case: str) -> None:
    options = {} if case == "mamba" else {"headdim": 4}
    model = Backbone(8, 2, case, {"d_state": 4, **options}).to(torch.bfloat16)
    x = hidden().to(torch.bfloat16)
    expected, _ = model(x)
    (y, _), cache = run_with_cache(model, x, ["*", "layers.*.mixer.mixing"])
    assert y.dtype == torch.bfloat16
    assert cache["layers.0.mixer.delta"].dtype == torch.float32
    assert (y - expected).float().norm() < 2e-2 * expected.float().norm()


def test_what_cannot_be_done_is_refused_in_one_line() -> None:
    model, x = backbone("mamba3"), hidden()
    with pytest.raises(DataError, match=r"layers\.0\.mixer\.convolved is no hook point"):
        run_with_cache(model, x, "layers.0.mixer.convolved")  # Mamba-3 has no convolution
    with pytest.raises(DataError, match=r"layers\.0\.mixer\.delta must return a tensor of shape \(2, 7, 4\)"):
        run_with_hooks(model, x, {"layers.0.mixer.delta": lambda t: t[:, :3]})
    with pytest.raises(DataError, match="has 0 stacks"):
        hook_names(torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="decay must not be negative"):
        run_with_hooks(model, x, {"layers.0.mixer.decay": torch.neg})
    with pytest.raises(DataError, match="replace one of them"):
        run_with_hooks(model, x, {"layers.0.mixer.mixing": torch.clone, "layers.0.mixer.states": torch.clone})
    with pytest.raises(DataError, match="without the state of an earlier call"):
        run_with_cache(model, x, "layers.0.mixer.mixing", state=model(x)[1])
    with hooked(model, {"final": torch.clone}), pytest.raises(DataError, match="hooks in place already"):
        run_with_cache(model, x)
    with pytest.raises(KeyError, match="was not kept"):
        run_with_cache(model, x, "final")[1]["embedded"]
