"""The selective scan: its definition against mathematics, every backend against the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.agreement import DTYPES, assert_backend_agrees, error
from tests.ops.backends import BACKENDS, DEVICE, TRITON
from torch import Tensor

from mambakit.ops import cpu, selective_scan, selective_scan_step
from mambakit.ops.inputs import CHUNK, TRITON_INTERVAL


def scan(**tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return selective_scan(**tensors, delta_softplus=True, return_final_state=True)


def make(
    batch: int = 2,
    length: int = 45,
    dim: int = 6,
    state: int = 3,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    sequences: int | None = None,
    optional: bool = True,
) -> dict[str, Tensor | None]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape).to(dtype)

    tensors: dict[str, Tensor | None] = {
        "u": activation(dim),
        "delta": activation(dim),
        "A": -2 * torch.rand(dim, state, dtype=wide),
        "B": activation(groups, state),
        "C": activation(groups, state),
    }
    if optional:
        tensors["D"] = torch.randn(dim, dtype=wide)
        tensors["z"] = activation(dim)
        tensors["delta_bias"] = torch.randn(dim, dtype=wide)
        tensors["initial_state"] = torch.randn(sequences or batch, dim, state, dtype=wide)
    return tensors


# The definition against mathematics.


def test_reference_with_constant_inputs_is_the_matrix_exponential() -> None:
    dim, state, length, dt = 3, 4, 7, 0.3
    A = -torch.rand(dim, state, dtype=torch.float64)
    h0 = torch.randn(1, dim, state, dtype=torch.float64)
    zeros = torch.zeros(1, length, dim, dtype=torch.float64)
    B = torch.zeros(1, length, state, dtype=torch.float64)
    delta = torch.full((1, length, dim), dt, dtype=torch.float64)
    _, h = selective_scan(zeros, delta, A, B, B, initial_state=h0, return_final_state=True, backend="reference")
    for d in range(dim):
        expected = torch.linalg.matrix_exp(dt * length * torch.diag(A[d])) @ h0[0, d]
        torch.testing.assert_close(h[0, d], expected)


def test_reference_with_constant_parameters_is_a_convolution() -> None:
    dim, state, length, dt = 3, 4, 20, 0.2
    A = -torch.rand(dim, state, dtype=torch.float64)
    B, C = torch.randn(2, state, dtype=torch.float64)
    u = torch.randn(1, length, dim, dtype=torch.float64)
    y = selective_scan(
        u,
        torch.full_like(u, dt),
        A,
        B.expand(1, length, state),
        C.expand(1, length, state),
        backend="reference",
    )
    lag = torch.arange(length, dtype=torch.float64)
    kernel = (torch.exp(lag[:, None, None] * dt * A) * dt * B * C).sum(-1)  # (length, dim)
    for t in range(length):
        expected = sum(kernel[t - s] * u[0, s] for s in range(t + 1))
        torch.testing.assert_close(y[0, t], expected)


def test_reference_sums_when_nothing_decays() -> None:
    u = torch.randn(1, 50, 2, dtype=torch.float64)
    ones = torch.ones(1, 50, 1, dtype=torch.float64)
    y = selective_scan(u, torch.ones_like(u), torch.zeros(2, 1, dtype=torch.float64), ones, ones, backend="reference")
    torch.testing.assert_close(y, u.cumsum(1))


def test_skip_gate_bias_and_softplus_are_applied_as_the_equation_says() -> None:
    t = make(dtype=torch.float64)
    u, delta, A, B, C, D, z, bias, h0 = t.values()
    dt = torch.log1p(torch.exp(delta + bias))
    plain = selective_scan(u, dt, A, B, C, initial_state=h0, backend="reference")
    torch.testing.assert_close(scan(**t, backend="reference")[0], (plain + D * u) * z * torch.sigmoid(z))


# Every backend against the definition.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_backend_agrees_with_the_reference(backend: str, dtype: torch.dtype, groups: int) -> None:
    assert_backend_agrees(scan, make(dtype=dtype, groups=groups), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(0, 3),
    length=st.one_of(st.integers(0, 3), st.integers(CHUNK - 1, 2 * CHUNK + 1)),
    share=st.integers(1, 5),
    state=st.integers(1, 5),
    groups=st.integers(1, 3),
    optional=st.booleans(),
)
@settings(max_examples=40)
def test_backend_agrees_at_any_shape(
    backend: str, batch: int, length: int, share: int, state: int, groups: int, optional: bool
) -> None:
    tensors = make(batch, length, share * groups, state, groups, optional=optional)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [15, 64, 65, 200])
def test_backend_agrees_across_blocks_of_channels(backend: str, dim: int) -> None:
    assert_backend_agrees(scan, make(dim=dim, state=16), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=st.lists(st.integers(0, 40), min_size=0, max_size=6))
@settings(max_examples=20)
def test_packed_sequences_give_what_separate_ones_give(backend: str, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    tensors = make(1, sum(lengths), sequences=len(lengths) or 0)
    tensors["initial_state"] = torch.randn(len(lengths), 6, 3)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": bounds}, backend, torch.float32)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_strided_and_transposed_inputs_are_read_where_they_lie(backend: str) -> None:
    batch, length, dim, state = 2, 40, 6, 3
    tensors = make(batch, length, dim, state)
    tensors["u"], tensors["z"] = torch.randn(batch, length, 2 * dim).chunk(2, dim=-1)
    tensors["delta"] = torch.randn(batch, dim, length).transpose(1, 2)
    tensors["B"], tensors["C"] = torch.randn(batch, length, 2, 2 * state)[..., ::2].split(1, dim=2)
    tensors["A"] = -torch.rand(state, dim).t()
    tensors["initial_state"] = torch.randn(state, dim, batch).permute(2, 1, 0)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_gradients_are_read_where_they_lie(backend: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in make().items() if t is not None}
    (from_sum,) = torch.autograd.grad(scan(**tensors, backend=backend)[0].sum(), [tensors["u"]])
    y = scan(**tensors, backend=backend)[0]
    (from_ones,) = torch.autograd.grad(y, [tensors["u"]], torch.ones_like(y))
    assert torch.equal(from_sum, from_ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(backend: str) -> None:
    tensors = make(1, 5, 2, 2, dtype=torch.float64)
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    assert torch.autograd.gradcheck(
        lambda *args: scan(**dict(zip(names, args, strict=True)), backend=backend), leaves, fast_mode=False
    )


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_gradient_of_the_final_state_alone(backend: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in make().items() if t is not None}
    grads = {}
    for name in (backend, "reference"):
        _, h = scan(**tensors, backend=name)
        grads[name] = torch.autograd.grad(h.square().sum(), [tensors["u"], tensors["A"], tensors["initial_state"]])
    for a, b in zip(grads[backend], grads["reference"], strict=True):
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-1e30, -100.0, -20.0, 0.0, 20.0, 88.0, 1e30])
def test_extreme_steps_stay_finite(backend: str, raw: float) -> None:
    tensors = make(dtype=torch.float32, optional=False)
    tensors["u"] = torch.full_like(tensors["u"], 1e-3)
    tensors["delta"] = torch.full_like(tensors["delta"], raw)
    tensors["A"] = -torch.logspace(-6, 6, 18).reshape(6, 3)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}
    y, h = scan(**leaves, backend=backend)
    grads = torch.autograd.grad((y / 1e30).sum() + (h / 1e30).sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (y, h, *grads))


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_nan_in_one_channel_stays_in_that_channel(backend: str) -> None:
    tensors = make(optional=False)
    tensors["u"][0, 10, 2] = math.nan
    y, h = scan(**tensors, backend=backend)
    assert y[0, 10:, 2].isnan().all()
    assert h[0, 2].isnan().all()
    y[0, 10:, 2], h[0, 2] = 0, 0
    assert y.isfinite().all()
    assert h.isfinite().all()


@pytest.mark.parametrize("isa", cpu.native.instruction_sets() if cpu.AVAILABLE else [])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_agrees_with_the_reference(isa: str, dtype: torch.dtype) -> None:
    best = cpu.native.instruction_set()
    cpu.native.use_instruction_set(isa)
    try:
        assert_backend_agrees(scan, make(dim=70, state=5, dtype=dtype), "cpu", dtype)
    finally:
        cpu.native.use_instruction_set(best)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    tensors = {name: t.requires_grad_() for name, t in make(3, 100, 200, 8).items() if t is not None}
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, h = scan(**tensors, backend="cpu")
        results.append((y, h, *torch.autograd.grad((y.sum() + h.sum()), list(tensors.values()))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_as_large_as_length_times_dim_times_state_is_kept() -> None:
    batch, length, dim, state = 1, 512, 32, 16
    tensors = {name: t.requires_grad_() for name, t in make(batch, length, dim, state).items() if t is not None}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scan(**tensors)
    assert kept
    states = (length // TRITON_INTERVAL + 1) * dim * state if DEVICE == "cuda" else 0
    assert max(kept) == max(batch * length * dim, states)  # the inputs themselves, and a state every few steps


# Steps, mixed dtypes, operators.


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_steps_give_what_the_whole_gives(backend: str) -> None:
    t = make(length=9, dtype=torch.float64)
    whole, last = scan(**t, backend=backend)
    h = t["initial_state"]
    for i in range(9):
        y, h = selective_scan_step(
            h,
            t["u"][:, i],
            t["delta"][:, i],
            t["A"],
            t["B"][:, i],
            t["C"][:, i],
            t["D"],
            t["z"][:, i],
            t["delta_bias"],
            delta_softplus=True,
            backend=backend,
        )
        torch.testing.assert_close(y, whole[:, i])
    torch.testing.assert_close(h, last)


def test_activations_of_mixed_dtypes_are_promoted() -> None:
    t = make(optional=False)
    t["u"] = t["u"].to(torch.bfloat16)
    y, h = scan(**t)
    assert y.dtype == torch.float32
    assert h.dtype == torch.float32
    assert error(y, scan(**t, backend="reference")[0]) < 1e-5


def test_operator_passes_opcheck() -> None:
    t = make(length=5)
    leaves = [None if x is None else x.requires_grad_() for x in t.values()]
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.mambakit.selective_scan.default, (*leaves, None, True, True, backend))


def test_three_axes_of_B_and_C_are_one_group() -> None:
    t = make()
    one = scan(**t)[0]
    t["B"], t["C"] = t["B"].squeeze(2), t["C"].squeeze(2)
    assert torch.equal(scan(**t)[0], one)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.randn(2, 45)}, "u must have shape"),
        ({"delta": torch.randn(2, 45, 7)}, "delta must have shape"),
        ({"A": torch.randn(6)}, "A must have shape"),
        ({"A": torch.randn(5, 3)}, "A must have shape"),
        ({"B": torch.randn(2, 45, 4, 3)}, "groups of B must divide dim"),
        ({"C": torch.randn(2, 45, 1, 4)}, "C must have shape"),
        ({"D": torch.randn(5)}, "D must have shape"),
        ({"z": torch.randn(2, 44, 6)}, "z must have shape"),
        ({"delta_bias": torch.randn(1, 6)}, "delta_bias must have shape"),
        ({"initial_state": torch.randn(1, 6, 3)}, "initial_state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 45])}, "packed sequences need a batch of 1"),
        ({"backend": "cuda"}, "is not a backend"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make(), **change})


@pytest.mark.parametrize("bounds", [[0, 44], [1, 45], [0, 30, 20, 45]])
@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON, "reference"])
def test_bounds_that_do_not_rise_to_the_length_are_refused(bounds: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the length 45"):
        selective_scan(**make(1, optional=False), cu_seqlens=torch.tensor(bounds), backend=backend)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="u must be float32"):
        selective_scan(**{**make(optional=False), "u": torch.ones(2, 45, 6, dtype=torch.int64)})
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        selective_scan(**make(1, optional=False), cu_seqlens=torch.tensor([0.0, 45.0]))
