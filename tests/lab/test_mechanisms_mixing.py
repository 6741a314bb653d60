"""The token-mixing matrix against the scan run on impulses, and what blocking its entries does."""

import math

import pytest
import torch
from tests.lab.mechanism_models import CASES, GENERATIONS, LENGTH, Classifier, backbone, hidden, tokens
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.mechanisms import blocked, patching_effects, run_with_cache, run_with_hooks, substituted
from mambakit.nn import Backbone


@pytest.mark.parametrize("case", CASES)
def test_the_matrix_times_the_values_is_the_scan(case: str) -> None:
    """By impulses: a value at j alone, everything else as it was, leaves column j of M at the scan's output."""
    model, x = backbone(case, layers=1), hidden(batch=1)
    mixer, prefix = model.layers[0].mixer, "layers.0.mixer."
    _, cache = run_with_cache(model, x, [prefix + "x", prefix + "mixing"])
    values, matrix = cache[prefix + "x"], cache[prefix + "mixing"]
    assert (matrix.triu(1) == 0).all()
    mimo = matrix.dim() == 6
    for j in range(LENGTH):
        impulse = torch.zeros_like(values)
        impulse[:, j] = 1.0
        seen: list[Tensor] = []
        hooks = {prefix + "x": lambda _, v=impulse: v, prefix + "scan_output": seen.append}
        run_with_hooks(model, x, hooks)
        column = seen[0][0].clone()  # (length, [rank,] heads, headdim) or (length, d_inner)
        D = mixer.D if not hasattr(mixer, "skip") else mixer.skip
        if mimo:
            column[j] -= D[:, None] * mixer.mimo_x.transpose(0, 1)
            expected = torch.einsum("hrsi,hsp->irhp", matrix[0, ..., j], mixer.mimo_x)
        elif column.dim() == 2:
            column[j] -= D
            expected = matrix[0, :, :, j].mT
        else:
            column[j] -= D[:, None] if D.dim() == 1 else D
            expected = matrix[0, :, :, j].mT[..., None].expand_as(column)
        torch.testing.assert_close(column, expected, rtol=0, atol=1e-10)


def test_the_matrix_of_mamba2_is_the_one_of_the_paper() -> None:
    """Semiseparable: C_i . B_j exp(A (delta_{j+1} + ... + delta_i)) delta_j, entry by entry."""
    model = backbone("mamba2", layers=1)
    mixer = model.layers[0].mixer
    _, cache = run_with_cache(model, hidden(batch=1), ["*", "layers.0.mixer.mixing"])
    B, C, delta, matrix = (cache[f"layers.0.mixer.{name}"][0] for name in ("B", "C", "delta", "mixing"))
    for head in range(mixer.heads):
        group, A = head // (mixer.heads // mixer.n_groups), -math.exp(mixer.A_log[head].item())
        for i in range(LENGTH):
            for j in range(i + 1):
                decay = math.exp(A * delta[j + 1 : i + 1, head].sum().item())
                entry = (C[i, group] @ B[j, group]) * decay * delta[j, head]
                torch.testing.assert_close(matrix[head, i, j], entry, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", GENERATIONS)
def test_steep_decays_over_a_long_sequence_stay_finite_with_their_gradients(case: str) -> None:
    options = {"mamba": {}, "mamba2": {"headdim": 8}, "mamba3": {"headdim": 8}}[case]
    model = Backbone(8, 1, case, {"d_state": 4, **options})
    x = (5 * torch.randn(1, 400, 8)).requires_grad_()
    bias = model.layers[0].mixer.dt_proj.bias if case == "mamba" else model.layers[0].mixer.dt_bias
    with torch.no_grad():
        bias += 8.0  # steps of eight: decays of exp(-8), and below
    expected, _ = model(x)
    y, _ = run_with_hooks(model, x, {"layers.0.mixer.mixing": torch.clone})
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("case", GENERATIONS)
def test_a_blocked_source_no_longer_reaches_the_output(case: str) -> None:
    """With the convolution an identity, position 2 reaches 5 by the matrix alone."""
    model, x = backbone(case, layers=1), hidden()
    if case != "mamba3":
        with torch.no_grad():
            model.layers[0].mixer.conv1d.weight[..., :-1] = 0.0
    other = x.clone()
    other[:, 2] = torch.randn(2, 8, dtype=torch.float64)
    # Mamba-3 turns keys by the angles summed on the way, and the decay sums steps: both go on through position 2.
    cache = run_with_cache(model, x, "layers.0.mixer.mixing")[1]["layers.0.mixer.mixing"]
    kept, hook = {}, blocked([(5, 2)])
    for name, tokens_in in (("one", x), ("other", other)):
        hooks = {"layers.0.mixer.mixing": lambda _: hook(cache)}
        kept[name] = run_with_hooks(model, tokens_in, hooks)[0]
    torch.testing.assert_close(kept["one"][:, 5], kept["other"][:, 5], rtol=0, atol=1e-12)
    assert (kept["one"][:, 6] - kept["other"][:, 6]).abs().max() > 1e-6
    assert (kept["one"][:, 5] - model(x)[0][:, 5]).abs().max() > 1e-6


def test_blocking_a_head_leaves_the_others() -> None:
    model, x = backbone("mamba2", layers=1), hidden()
    points = {"layers.0.mixer.mixing": blocked([(6, j) for j in range(7)], heads=[1])}
    before = run_with_cache(model, x, "layers.0.mixer.scan_output")[1]["layers.0.mixer.scan_output"]
    seen: list[Tensor] = []
    run_with_hooks(model, x, {**points, "layers.0.mixer.scan_output": seen.append})
    changed = (seen[0] - before).abs().amax(dim=(0, 3)) > 1e-12  # (length, heads)
    assert changed.nonzero().tolist() == [[6, 1]]


@pytest.mark.parametrize("entry", [(2, 3), (7, 0), (3, -1)])
def test_entries_that_are_none_of_the_matrix_are_refused(entry: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"must have 0 <= j <= i < 7"):
        run_with_hooks(backbone("mamba"), hidden(), {"layers.0.mixer.mixing": blocked([entry])})


@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_what_leaves_the_convolution_can_be_substituted(case: str) -> None:
    model, x = backbone(case, layers=1), hidden()
    name = "layers.0.mixer.convolved"
    values = torch.randn_like(run_with_cache(model, x, name)[1][name])
    seen: list[Tensor] = []
    hooks = {name: substituted(values, [2, -1]), "layers.0.mixer.x": seen.append}
    run_with_hooks(model, x, hooks)
    x_of_values = values[..., : seen[0][0, 0].numel()].view_as(seen[0])
    same = (seen[0] == x_of_values).flatten(2).all(-1).all(0)
    assert same.nonzero().flatten().tolist() == [2, 6]
    with pytest.raises(DataError, match="9 is outside of 7"):
        run_with_hooks(model, x, {name: substituted(values, [9])})


def test_patching_finds_the_position_in_which_two_runs_differ() -> None:
    model = Classifier(backbone("mamba2"))
    clean = tokens(batch=1)
    corrupted = clean.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 1) % 11
    goal, cache = run_with_cache(model, clean, "embedded")
    names, effects = patching_effects(model, corrupted, cache, "embedded", lambda logits: (logits - goal).abs().sum())
    assert names == ("embedded",)
    assert effects.shape == (1, LENGTH)
    assert effects[0, 3] < 1e-10
    assert (effects[0, [0, 1, 2, 4, 5, 6]] > 1e-6).all()
