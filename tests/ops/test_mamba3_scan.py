"""The scan of Mamba-3: its definition against an independent recurrence, every backend against the definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.agreement import DTYPES, assert_backend_agrees, error
from tests.ops.backends import BACKENDS
from torch import Tensor

from mambakit.ops import Mamba3State, mamba3_scan, mamba3_step, ssd
from mambakit.ops.rotation import accumulate, rotate

CHUNK_SIZE = 8  # small, so that short sequences have several chunks
STATE = ("initial_angle", "initial_ssm", "initial_k", "initial_v")
WITHOUT_LENGTH = ("D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")


def scan(**given: Any) -> tuple[Tensor, ...]:
    """y and the final state, its angle as a point on the circle, where 0 and 2 pi are one."""
    y, state = scan_with_state(**given)
    return y, state.angle.cos(), state.angle.sin(), state.ssm, state.k, state.v


def scan_with_state(**given: Any) -> tuple[Tensor, Mamba3State]:
    carried = [given.pop(name, None) for name in STATE]
    state = None if carried[0] is None else Mamba3State(*carried)
    options = {"chunk_size": CHUNK_SIZE, "dt_softplus": True, "return_final_state": True}
    return mamba3_scan(**{**options, **given}, initial_state=state)


def make(
    batch: int = 2,
    length: int = 21,
    heads: int = 4,
    headdim: int = 3,
    state: int = 8,
    groups: int = 1,
    rank: int | None = None,
    pairs: int = 2,
    dtype: torch.dtype = torch.float32,
    sequences: int | None = None,
    optional: bool = True,
) -> dict[str, Tensor]:
    """Inputs of the scan; without a rank there is no such axis (SISO)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count, ranks = batch if sequences is None else sequences, () if rank is None else (rank,)

    def activation(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape).to(dtype)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=wide)

    tensors = {
        "x": activation(heads, headdim),
        "dt": activation(heads),
        "A": -2 * torch.rand(batch, length, heads, dtype=wide),
        "B": activation(*ranks, groups, state),
        "C": activation(*ranks, groups, state),
        "trap": activation(heads),
        "angles": activation(pairs),
    }
    if optional:
        tensors |= {
            "D": parameter(heads),
            "z": activation(heads, headdim),
            "dt_bias": parameter(heads),
            "B_bias": parameter(heads, rank or 1, state),
            "C_bias": parameter(heads, rank or 1, state),
            "initial_angle": parameter(count, heads, pairs),
            "initial_ssm": parameter(count, heads, headdim, state),
            "initial_k": parameter(count, rank or 1, heads, state),
            "initial_v": torch.randn(count, heads, headdim).to(dtype),
        }
        if rank is not None:
            tensors |= {name: parameter(heads, rank, headdim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    return tensors


# The definition against mathematics.


def turned(vector: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """`vector` (state,) as complex numbers, each turned by its angle."""
    state, pairs = vector.shape[0], angle.shape[0]
    first = [2 * i if interleaved else i for i in range(pairs)]
    second = [i + 1 if interleaved else i + state // 2 for i in first]
    after = vector.clone()
    numbers = torch.complex(vector[first], vector[second]) * torch.exp(1j * angle)
    after[first], after[second] = numbers.real, numbers.imag
    return after


def by_hand(tensors: dict[str, Tensor], batch: int, head: int, interleaved: bool) -> tuple[Tensor, ...]:
    """y (length, headdim) of one head of one sequence, and its angle and state, from the equations one by one."""
    t = dict(tensors)
    rank, share = t["B"].shape[2], t["x"].shape[2] // t["B"].shape[3]
    angle, h = t["initial_angle"][batch, head], t["initial_ssm"][batch, head]
    k_before = [t["initial_k"][batch, r, head] for r in range(rank)]
    x_before = t["initial_v"][batch, head]
    outputs = []
    for i in range(t["x"].shape[1]):
        x, z = t["x"][batch, i, head], t["z"][batch, i, head]
        dt = torch.log1p(torch.exp(t["dt"][batch, i, head] + t["dt_bias"][head]))
        weight = 1 / (1 + torch.exp(-t["trap"][batch, i, head]))
        angle = angle + math.pi * torch.tanh(t["angles"][batch, i]) * dt
        decay = torch.exp(t["A"][batch, i, head] * dt)
        h = decay * h
        k = [turned(t["B"][batch, i, r, head // share] + t["B_bias"][head, r], angle, interleaved) for r in range(rank)]
        for r in range(rank):
            up = t["mimo_x"][head, r]
            h = h + (1 - weight) * dt * decay * torch.outer(x_before * up, k_before[r])
            h = h + weight * dt * torch.outer(x * up, k[r])
        y = torch.zeros_like(x)
        for r in range(rank):
            q = turned(t["C"][batch, i, r, head // share] + t["C_bias"][head, r], angle, interleaved)
            gate = z * t["mimo_z"][head, r]
            y = y + t["mimo_o"][head, r] * (h @ q + t["D"][head] * x * t["mimo_x"][head, r]) * gate * torch.sigmoid(
                gate
            )
        outputs.append(y)
        x_before, k_before = x, k
    return torch.stack(outputs), angle, h, torch.stack(k_before), x_before


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rank", "pairs"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_scan_is_the_recurrence_of_the_equations(backend: str, rank: int, pairs: int, interleaved: bool) -> None:
    tensors = make(length=11, groups=2, rank=rank, pairs=pairs, dtype=torch.float64)
    y, state = scan_with_state(**tensors, interleaved=interleaved, backend=backend)
    for batch in range(2):
        for head in range(4):
            expected, angle, h, k, v = by_hand(tensors, batch, head, interleaved)
            torch.testing.assert_close(y[batch, :, head], expected)
            torch.testing.assert_close(state.angle[batch, head], angle.remainder(2 * math.pi))
            torch.testing.assert_close(state.ssm[batch, head], h)
            torch.testing.assert_close(state.k[batch, :, head], k)
            torch.testing.assert_close(state.v[batch, head], v)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_by_eulers_rule_and_without_turns_it_is_the_scan_of_mamba2(backend: str) -> None:
    t = make(dtype=torch.float64, optional=False)
    rates = -torch.rand(4, dtype=torch.float64)
    only_the_present = torch.full_like(t["trap"], math.inf)
    changed = {**t, "A": rates.expand_as(t["A"]), "trap": only_the_present, "angles": torch.zeros_like(t["angles"])}
    y, state = scan_with_state(**changed, backend=backend)
    expected, h = ssd(t["x"], t["dt"], rates, t["B"], t["C"], dt_softplus=True, return_final_state=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state.ssm, h)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_only_the_turns_between_two_steps_matter(backend: str) -> None:
    t = make(dtype=torch.float64)
    for name in ("initial_ssm", "initial_k", "initial_v"):
        t[name] = torch.zeros_like(t[name])
    y, *_ = scan(**t, backend=backend)
    t["initial_angle"] = t["initial_angle"] + torch.randn_like(t["initial_angle"])
    torch.testing.assert_close(scan(**t, backend=backend)[0], y)


def test_interleaved_pairs_are_neighbours_and_others_lie_half_the_state_apart() -> None:
    quarter = torch.tensor([math.pi / 2])
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(rotate(vector, quarter, interleaved=True), torch.tensor([-2.0, 1.0, 3.0, 4.0]))
    torch.testing.assert_close(rotate(vector, quarter, interleaved=False), torch.tensor([-3.0, 2.0, 1.0, 4.0]))


def test_angles_stay_exact_over_a_million_steps() -> None:
    turn = torch.rand(1, 1_000_000, 1, 1)
    angle, last = accumulate(turn, torch.zeros(1, 1, 1), None)
    exact = torch.tensor(math.fmod(math.fsum(turn.flatten().tolist()), 2 * math.pi))
    assert abs(torch.exp(1j * last).squeeze() - torch.exp(1j * exact)) < 1e-6
    assert torch.equal(angle[:, -1], last)


# Every backend against the definition.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "groups"), [(None, 1), (None, 2), (2, 4), (4, 1)])
def test_backend_agrees_with_the_reference(backend: str, dtype: torch.dtype, rank: int | None, groups: int) -> None:
    assert_backend_agrees(scan, make(dtype=dtype, rank=rank, groups=groups), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(0, 3),
    length=st.one_of(st.integers(0, 2), st.integers(CHUNK_SIZE - 1, 2 * CHUNK_SIZE + 1)),
    share=st.integers(1, 3),
    headdim=st.integers(1, 3),
    half_state=st.integers(1, 3),
    groups=st.integers(1, 2),
    rank=st.sampled_from([None, 1, 2, 4]),
    pairs=st.integers(0, 3),
    optional=st.booleans(),
)
@settings(max_examples=25)
def test_backend_agrees_at_any_shape(
    backend: str,
    batch: int,
    length: int,
    share: int,
    headdim: int,
    half_state: int,
    groups: int,
    rank: int | None,
    pairs: int,
    optional: bool,
) -> None:
    pairs = min(pairs, half_state)
    tensors = make(batch, length, share * groups, headdim, 2 * half_state, groups, rank, pairs, optional=optional)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_angles_of_each_head_agree_with_the_reference(backend: str) -> None:
    tensors = make(rank=2)
    tensors["angles"] = torch.randn(2, 21, 4, 2)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_half_the_state_apart_agree_with_the_reference(backend: str) -> None:
    def halves(**given: Any) -> tuple[Tensor, ...]:
        return scan(**given, interleaved=False)

    assert_backend_agrees(halves, make(rank=2), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_mimo_o_there_is_an_output_for_each_rank(backend: str) -> None:
    tensors = make(rank=2)
    mimo_o = tensors.pop("mimo_o")
    each = scan(**tensors, backend=backend)[0]
    assert each.shape == (2, 21, 2, 4, 3)
    together = scan(**tensors, mimo_o=mimo_o, backend=backend)[0]
    torch.testing.assert_close((each * mimo_o.transpose(0, 1)).sum(2), together)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(lengths=st.lists(st.integers(0, 20), min_size=0, max_size=5), optional=st.booleans())
@settings(max_examples=12)
def test_packed_sequences_give_what_separate_ones_give(
    backend: str, dtype: torch.dtype, lengths: list[int], optional: bool
) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)
    tensors = make(1, sum(lengths), rank=2, sequences=len(lengths), optional=optional)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": bounds}, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_transposed_inputs_are_read_where_they_lie(backend: str) -> None:
    batch, length, heads, headdim, state = 2, 21, 4, 3, 8
    tensors = make(batch, length, heads, headdim, state)
    tensors["x"], tensors["z"] = torch.randn(batch, length, heads, 2 * headdim).chunk(2, dim=-1)
    tensors["dt"] = torch.randn(batch, heads, length).transpose(1, 2)
    tensors["B"], tensors["C"] = torch.randn(batch, length, 2, 2 * state)[..., ::2].split(1, dim=2)
    tensors["initial_ssm"] = torch.randn(state, headdim, heads, batch).permute(3, 2, 1, 0)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_pass_gradcheck(backend: str, rank: int | None) -> None:
    tensors = make(1, 3, 2, 1, 2, rank=rank, pairs=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        return scan(**dict(zip(tensors, args, strict=True)), chunk_size=2, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", range(6))
def test_gradient_of_one_output_alone(backend: str, output: int) -> None:
    tensors = {name: t.requires_grad_() for name, t in make(rank=2, dtype=torch.float64).items()}
    grads = {}
    for name in (backend, "reference"):
        result = scan(**tensors, backend=name)[output]
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
        grads[name] = torch.autograd.grad((result * weights).sum(), list(tensors.values()), allow_unused=True)
    for a, b in zip(grads[backend], grads["reference"], strict=True):
        assert b is None or error(torch.zeros_like(b) if a is None else a, b) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-1e30, -100.0, -20.0, 0.0, 20.0, 88.0, 1e30])
def test_extreme_steps_stay_finite(backend: str, raw: float) -> None:
    tensors = make(optional=False)
    tensors["x"] = torch.full_like(tensors["x"], 1e-3)
    tensors["dt"] = torch.full_like(tensors["dt"], raw)
    tensors["A"] = -torch.logspace(-6, 6, 2 * 21 * 4).reshape(2, 21, 4)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    y, _, _, ssm, k, _ = scan(**leaves, backend=backend)
    grads = torch.autograd.grad((y / 1e30).sum() + (ssm / 1e30).sum() + k.sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (y, ssm, k, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-1e30, -100.0, 100.0, 1e30])
@pytest.mark.parametrize("name", ["trap", "angles"])
def test_extreme_weights_and_turns_stay_finite(backend: str, name: str, raw: float) -> None:
    tensors = make()
    tensors[name] = torch.full_like(tensors[name], raw)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_forgets_everything_leaves_later_decays_exact(backend: str) -> None:
    tensors = make(dtype=torch.float32, optional=False)
    tensors["A"] = torch.full_like(tensors["A"], -1e-3)
    tensors["A"][:, 3] = -1e6
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_head_stays_in_that_head(backend: str) -> None:
    tensors = make(optional=False)
    tensors["x"][0, 10, 2] = math.nan
    y, *_, ssm, _, _ = scan(**tensors, backend=backend)
    assert y[0, 10:, 2].isnan().all()
    assert ssm[0, 2].isnan().all()
    others = [0, 1, 3]
    assert y[0, :, others].isfinite().all()
    assert ssm[0, others].isfinite().all()
    assert y[1].isfinite().all()


def test_autocast_leaves_the_precision_of_the_inputs_alone() -> None:
    tensors = make(rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        under = scan(**tensors)
    for a, b in zip(under, scan(**tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [None, 2])
def test_chunk_size_does_not_change_the_result(rank: int | None) -> None:
    tensors = make(rank=rank, dtype=torch.float64)
    whole = scan(**tensors, chunk_size=1000)
    for chunk_size in (1, 2, 5, 21, None):
        for a, b in zip(scan(**tensors, chunk_size=chunk_size), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rank", [None, 2])
def test_cpu_backend_gives_the_same_bits_for_any_number_of_threads(rank: int | None) -> None:
    tensors = {name: t.requires_grad_() for name, t in make(1, 90, 6, 16, 32, 2, rank, pairs=8).items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs = scan(**tensors, backend="cpu")
            grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), list(tensors.values()))
            found.append((*outputs, *grads))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        for name, a, b in zip(("y", "cos", "sin", "ssm", "k", "v", *tensors), found[0], others, strict=True):
            assert torch.equal(a, b), name


# Steps, dtypes, operators.


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_give_what_the_whole_gives(backend: str, rank: int | None, dtype: torch.dtype) -> None:
    tensors = make(length=9, rank=rank, dtype=dtype)
    whole, last = scan_with_state(**tensors, backend=backend)
    state = Mamba3State(*(tensors.pop(name) for name in STATE))
    constant = {name: tensors.pop(name) for name in WITHOUT_LENGTH if name in tensors}
    # In bfloat16 sums that differ in the last digit of float32 may round y to either neighbour.
    bound = 1e-12 if dtype == torch.float64 else 2e-3
    for i in range(9):
        step = {name: t[:, i] for name, t in tensors.items()}
        y, state = mamba3_step(state, **step, **constant, dt_softplus=True, backend=backend)
        assert error(y, whole[:, i]) < bound
    for a, b in zip(state, last, strict=True):
        assert error(a, b) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_states_are_carried_in_float32_and_the_last_input_as_it_came(backend: str) -> None:
    y, state = scan_with_state(**make(dtype=torch.bfloat16), backend=backend)
    assert {state.angle.dtype, state.ssm.dtype, state.k.dtype} == {torch.float32}
    assert {y.dtype, state.v.dtype} == {torch.bfloat16}


def test_activations_of_mixed_dtypes_are_promoted() -> None:
    tensors = make(optional=False)
    tensors["x"] = tensors["x"].to(torch.bfloat16)
    y, *_ = scan(**tensors)
    assert y.dtype == torch.float32
    assert error(y, scan(**tensors, backend="reference")[0]) < 1e-5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("rank", [1, 2])
def test_operator_of_the_recurrence_passes_opcheck(rank: int) -> None:
    v, k, q = leaf(2, 5, rank, 3, 2), leaf(2, 5, rank, 3, 4), leaf(2, 5, rank, 3, 4)
    log_decay, scale, gamma = (-torch.rand(2, 5, 3)).requires_grad_(), leaf(2, 5, 3), leaf(2, 5, 3)
    given = (v, k, q, log_decay, scale, gamma, leaf(2, 3, 2, 4), None, 2, True, "portable")
    torch.library.opcheck(torch.ops.mambakit.mamba3_recurrence.default, given)


@pytest.mark.parametrize("optional", [True, False])
def test_operator_of_the_whole_scan_passes_opcheck(optional: bool) -> None:
    rows = (leaf(2, 5, 4, 3), leaf(2, 5, 2, 2, 4), leaf(2, 5, 2, 2, 4))
    weights = ((-torch.rand(2, 5, 4)).requires_grad_(), leaf(2, 5, 4), leaf(2, 5, 4))
    if optional:
        heads = (leaf(4, 3), *(leaf(4, 2, 3) for _ in range(3)), *(leaf(4, 2, 4) for _ in range(2)))
        turns = (leaf(2, 5, 1, 2), leaf(2, 5, 4), leaf(2, 4, 2))
        tensors = (*rows, leaf(2, 5, 4, 3), *weights, *heads, *turns, leaf(2, 4, 3, 4))
    else:
        tensors = (*rows, None, *weights, *[None] * 10)
    # A chunk size that leaves no slot of the kept states unused.
    torch.library.opcheck(torch.ops.mambakit.mamba3_scan.default, (*tensors, None, True, 4, True, "cpu"))


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 21, 4)}, "x must have shape"),
        ({"dt": torch.randn(2, 21, 5)}, "dt must have shape"),
        ({"A": torch.randn(4)}, "A must have shape"),
        ({"trap": torch.randn(2, 20, 4)}, "trap must have shape"),
        ({"B": torch.randn(2, 21, 8)}, "B must have shape"),
        ({"B": torch.randn(2, 21, 3, 8)}, "groups of B must divide heads"),
        ({"C": torch.randn(2, 21, 1, 7)}, "C must have shape"),
        ({"angles": torch.randn(2, 21)}, "angles must have shape"),
        ({"angles": torch.randn(2, 21, 3, 2)}, "angles must have shape"),
        ({"angles": torch.randn(2, 21, 5)}, "5 angles can't turn the pairs of a state of 8"),
        ({"D": torch.randn(5)}, "D must have shape"),
        ({"z": torch.randn(2, 20, 4, 3)}, "z must have shape"),
        ({"dt_bias": torch.randn(1, 4)}, "dt_bias must have shape"),
        ({"B_bias": torch.randn(4, 8)}, "B_bias must have shape"),
        ({"mimo_o": torch.randn(4, 2, 3)}, "mimo_o must have shape"),
        ({"initial_k": torch.randn(2, 4, 8)}, "initial_state.k must have shape"),
        ({"initial_angle": torch.randn(1, 4, 2)}, "initial_state.angle must have shape"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"cu_seqlens": torch.tensor([0, 21])}, "packed sequences need a batch of 1"),
        ({"backend": "cuda"}, "is not a backend"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(**{**make(), **change})


@pytest.mark.parametrize("bounds", [[0, 20], [1, 21], [0, 30, 10, 21], [0, 30, 21]])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_bounds_that_do_not_rise_to_the_length_are_refused(bounds: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the length 21"):
        scan(**make(1, optional=False), cu_seqlens=torch.tensor(bounds), backend=backend)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="trap must be float32"):
        scan(**{**make(), "trap": torch.ones(2, 21, 4, dtype=torch.int64)})
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        scan(**make(1, optional=False), cu_seqlens=torch.tensor([0.0, 21.0]))
