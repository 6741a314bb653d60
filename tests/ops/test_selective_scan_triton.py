"""The selective scan's GPU kernels: what they do that no other backend does, cut the length and the channels up."""

import pytest
import torch
from tests.ops.agreement import assert_backend_agrees, error
from tests.ops.backends import DEVICE, TRITON
from tests.ops.test_selective_scan import make, scan

from mambakit.ops import selective_scan, selective_scan_step

pytestmark = pytest.mark.skipif(not TRITON, reason="neither a GPU nor Triton's interpreter")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one and two blocks of steps, so that few steps make many of them."""
    from mambakit.ops.triton import selective_scan as kernels

    usual = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *shape: usual(*shape)._replace(size=16, backward_size=32, split=0))


@pytest.fixture(params=[2, 16])
def lanes_that_share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many lanes share the states of a channel, as they do where there are many channels."""
    from mambakit.ops.triton import selective_scan as kernels

    usual = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *shape: usual(*shape)._replace(split=request.param))
    return int(request.param)


@pytest.mark.parametrize("length", [1, 16, 33])
def test_one_segment_agrees(length: int) -> None:
    assert_backend_agrees(scan, make(1, length, 3, 3), "triton", torch.float32)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_segments_agree(dtype: torch.dtype) -> None:
    assert_backend_agrees(scan, make(1, 50, 3, 2, dtype=dtype), "triton", dtype)


@pytest.mark.parametrize(("length", "dtype"), [(2, torch.float32), (19, torch.bfloat16)])
def test_states_shared_by_lanes_agree(lanes_that_share: int, length: int, dtype: torch.dtype) -> None:
    assert_backend_agrees(scan, make(2, length, 9, max(lanes_that_share, 8), dtype=dtype), "triton", dtype)


def test_states_shared_by_lanes_agree_in_groups(lanes_that_share: int) -> None:
    assert_backend_agrees(scan, make(1, 9, 18, lanes_that_share, groups=2), "triton", torch.float32)


def test_bare_scan_of_shared_states_agrees(lanes_that_share: int) -> None:
    assert_backend_agrees(scan, make(1, 9, 3, lanes_that_share, optional=False), "triton", torch.float32)


@pytest.mark.usefixtures("short_segments")
def test_bare_scan_agrees() -> None:
    assert_backend_agrees(scan, make(1, 40, 3, 3, optional=False), "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_wider_than_a_block_of_channels_agree(dtype: torch.dtype) -> None:
    assert_backend_agrees(scan, make(1, 2, 130, 2, groups=2, dtype=dtype), "triton", dtype)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("lengths", [[0, 5, 0, 34, 0], [16, 1], [0], []])
def test_packed_sequences_agree(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    tensors = make(1, sum(lengths), 3, 3)
    tensors["initial_state"] = torch.randn(len(lengths), 3, 3)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": bounds}, "triton", torch.float32)


@pytest.mark.usefixtures("short_segments")
def test_bounds_that_change_in_place_are_read_again() -> None:
    tensors = make(1, 40, 3, 3, optional=False)
    bounds = torch.tensor([0, 10, 40])
    scan(**tensors, cu_seqlens=bounds, backend="triton")
    bounds[1] = 25
    got = scan(**tensors, cu_seqlens=bounds, backend="triton")
    for a, b in zip(got, scan(**tensors, cu_seqlens=bounds, backend="reference"), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("raw", [-1e30, 88.0, 1e30])
def test_extreme_steps_stay_finite(raw: float) -> None:
    tensors = make(1, 18, 6, 3, optional=False)
    tensors["u"] = torch.full_like(tensors["u"], 1e-3)
    tensors["delta"] = torch.full_like(tensors["delta"], raw)
    tensors["A"] = -torch.logspace(-6, 6, 18).reshape(6, 3)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}
    y, h = scan(**leaves, backend="triton")
    grads = torch.autograd.grad((y / 1e30).sum() + (h / 1e30).sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (y, h, *grads))


def test_small_steps_keep_their_digits() -> None:
    """log(1 + e) of a small e would lose them, and Mamba's steps are small."""
    ones = torch.ones(1, 1, 64)
    raw = torch.linspace(-16, 20, 64).reshape(1, 1, 64)
    zero_A, one_B = torch.zeros(64, 1), torch.ones(1, 1, 1)
    y = selective_scan(ones, raw, zero_A, one_B, one_B, delta_softplus=True, backend="triton")
    torch.testing.assert_close(y, torch.nn.functional.softplus(raw.double()).float(), rtol=3e-6, atol=0)


def test_steps_give_what_the_whole_gives() -> None:
    t = make(2, 5, 6, 3, groups=2)
    whole, last = scan(**t, backend="triton")
    h = t["initial_state"]
    for i in range(5):
        now = {name: t[name][:, i] for name in ("u", "delta", "B", "C", "z")}
        fixed = {name: t[name] for name in ("A", "D", "delta_bias")}
        y, h = selective_scan_step(h, **now, **fixed, delta_softplus=True, backend="triton")
        torch.testing.assert_close(y, whole[:, i])
    torch.testing.assert_close(h, last)


@pytest.mark.usefixtures("short_segments")
def test_gradients_are_the_same_every_time() -> None:
    leaves = {name: t.requires_grad_() for name, t in make(1, 18, 34, 1).items() if t is not None}
    results = []
    for _ in range(2):
        y, h = scan(**leaves, backend="triton")
        results.append(torch.autograd.grad(y.sum() + h.sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no float64"):
        scan(**make(1, 2, 2, 2, dtype=torch.float64), backend="triton")
    for state in (0, 257):
        with pytest.raises(ValueError, match=f"1 to 256 states, and A has {state}"):
            scan(**make(1, 2, 2, state), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_takes_tensors_in_the_dtypes_and_strides_that_they_have(dtype: torch.dtype) -> None:
    batch, dim, state, groups = 3, 20, 5, 2
    u, delta, z = torch.randn(batch, 3 * dim, device=DEVICE).to(dtype).chunk(3, dim=-1)
    B, C = torch.randn(batch, 2 * groups, state, device=DEVICE).to(dtype).chunk(2, dim=1)
    A, (D, bias) = -torch.rand(dim, state, device=DEVICE), torch.randn(dim, 2, device=DEVICE).to(dtype).unbind(1)
    h = torch.randn(batch, state, dim, device=DEVICE).transpose(1, 2)
    kept, wide = h.clone(), [t.double() for t in (h, u, delta, A, B, C, D, z, bias)]
    y, after = selective_scan_step(h, u, delta, A, B, C, D, z, bias, delta_softplus=True, backend="triton")
    expected, expected_after = selective_scan_step(*wide, delta_softplus=True, backend="reference")
    assert y.dtype == dtype
    assert after.dtype == torch.float32
    assert torch.equal(h, kept)
    torch.testing.assert_close(y.double(), expected, atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0.03)
    torch.testing.assert_close(after.double(), expected_after, atol=1e-4, rtol=1e-4)


@pytest.fixture
def few_states_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What more than 64 states are, 9 are here: more than one call of the kernels takes."""
    import importlib

    operation = importlib.import_module("mambakit.ops.selective_scan")
    monkeypatch.setattr(operation, "TRITON_STATES_TOGETHER", 8)


@pytest.mark.usefixtures("few_states_together")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_parts_agree(dtype: torch.dtype) -> None:
    assert_backend_agrees(scan, make(2, 5, 4, 19, groups=2, dtype=dtype), "triton", dtype)


@pytest.mark.usefixtures("few_states_together")
def test_bare_states_in_parts_agree() -> None:
    assert_backend_agrees(scan, make(1, 3, 2, 9, optional=False), "triton", torch.float32)


@pytest.mark.usefixtures("few_states_together")
def test_packed_states_in_parts_agree() -> None:
    tensors = make(1, 5, 2, 9, sequences=3)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": torch.tensor([0, 2, 2, 5])}, "triton", torch.float32)


@pytest.mark.usefixtures("few_states_together")
def test_states_in_parts_agree_for_many_models_at_once() -> None:
    models = [make(1, 3, 2, 9) for _ in range(2)]
    stacked = {name: torch.stack([model[name] for model in models]) for name in models[0]}
    y, h = torch.vmap(lambda t: scan(**t, backend="triton"))(stacked)
    for i, model in enumerate(models):
        expected_y, expected_h = scan(**model, backend="reference")
        assert error(y[i], expected_y) < 1e-5
        assert error(h[i], expected_h) < 1e-5


def test_a_hundred_states_agree() -> None:
    assert_backend_agrees(scan, make(1, 2, 2, 100), "triton", torch.float32)


@pytest.mark.parametrize("length", [9, 24, 35])
def test_rounds_of_steps_under_way_end_where_the_sequence_does(lanes_that_share: int, length: int) -> None:
    assert_backend_agrees(scan, make(1, length, 2, lanes_that_share), "triton", torch.float32)


@pytest.mark.parametrize("depth", [1, 3])
def test_states_are_kept_whatever_the_rounds_under_way(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    from mambakit.ops.triton import selective_scan as kernels

    usual = kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *shape: usual(*shape)._replace(split=4, depth=depth))
    assert_backend_agrees(scan, make(1, 29, 2, 8), "triton", torch.float32)


@pytest.mark.parametrize("ahead", [1, 3, 16])
def test_states_are_kept_whatever_the_steps_under_way(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    from mambakit.ops.triton import selective_scan as kernels
    from mambakit.ops.triton.selective_scan_launches import Walk

    usual = kernels.plan
    walk = Walk(32, 1, ahead)
    monkeypatch.setattr(
        kernels, "plan", lambda *shape: usual(*shape)._replace(size=16, split=0, states=walk, outputs=walk)
    )
    assert_backend_agrees(scan, make(1, 37, 2, 3), "triton", torch.float32)
