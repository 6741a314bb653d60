"""The scan of Mamba-2: its definition against a dense semiseparable matrix, every backend against the definition."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.agreement import DTYPES, OUTPUT_BOUND, assert_backend_agrees, error
from tests.ops.backends import BACKENDS, TRITON
from torch import Tensor

from mambakit.ops import selective_scan, ssd, ssd_step

EVERYWHERE = [*BACKENDS, *TRITON]
CHUNK = 16  # steps, so that 45 of them are several chunks and a rest


def scan(**tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return ssd(**tensors, dt_softplus=True, return_final_state=True, chunk_size=CHUNK)


def make(
    batch: int = 2,
    length: int = 45,
    heads: int = 6,
    headdim: int = 4,
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
        "x": activation(heads, headdim),
        "dt": activation(heads),
        "A": -2 * torch.rand(heads, dtype=wide),
        "B": activation(groups, state),
        "C": activation(groups, state),
    }
    if optional:
        states = batch if sequences is None else sequences
        tensors["D"] = torch.randn(heads, headdim, dtype=wide)
        tensors["z"] = activation(heads, headdim)
        tensors["dt_bias"] = torch.randn(heads, dtype=wide)
        tensors["initial_state"] = torch.randn(states, heads, headdim, state, dtype=wide)
    return tensors


def leaves_of(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: t.requires_grad_() for name, t in tensors.items() if t is not None}


# The definition against mathematics.


def test_reference_is_a_dense_semiseparable_matrix() -> None:
    length, heads = 12, 2
    t = make(1, length, heads, dtype=torch.float64, optional=False)
    dt = torch.rand(1, length, heads, dtype=torch.float64)
    y = ssd(**{**t, "dt": dt}, backend="reference")
    for h in range(heads):
        mixing = torch.zeros(length, length, dtype=torch.float64)
        for i in range(length):
            for j in range(i + 1):
                decay = torch.exp((dt[0, j + 1 : i + 1, h] * t["A"][h]).sum())
                mixing[i, j] = (t["C"][0, i, 0] @ t["B"][0, j, 0]) * decay * dt[0, j, h]
        torch.testing.assert_close(y[0, :, h], mixing @ t["x"][0, :, h])


def test_reference_sums_when_nothing_decays() -> None:
    x = torch.randn(1, 50, 2, 3, dtype=torch.float64)
    ones = torch.ones(1, 50, 1, dtype=torch.float64)
    y = ssd(x, torch.ones_like(x[..., 0]), torch.zeros(2, dtype=torch.float64), ones, ones, backend="reference")
    torch.testing.assert_close(y, x.cumsum(1))


def test_reference_is_the_selective_scan_with_one_decay_for_each_head() -> None:
    t = make(heads=2, headdim=3, dtype=torch.float64)
    flat = {name: None if x is None else x.flatten(2) for name, x in t.items() if name in ("x", "z")}
    y, h = selective_scan(
        flat["x"],
        t["dt"].repeat_interleave(3, dim=2),
        t["A"].repeat_interleave(3)[:, None].expand(6, 3),
        t["B"],
        t["C"],
        t["D"].flatten(),
        flat["z"],
        t["dt_bias"].repeat_interleave(3),
        delta_softplus=True,
        initial_state=t["initial_state"].flatten(1, 2),
        return_final_state=True,
        backend="reference",
    )
    mine, state = scan(**t, backend="reference")
    torch.testing.assert_close(mine.flatten(2), y)
    torch.testing.assert_close(state.flatten(1, 2), h)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_steps_are_clamped_after_softplus_and_get_no_gradient_outside(backend: str) -> None:
    t = make(dtype=torch.float64, optional=False)
    least, greatest = 0.5, 0.9
    raw = t["dt"].requires_grad_()
    y = ssd(**t, dt_softplus=True, dt_limit=(least, greatest), backend=backend)
    dt = torch.nn.functional.softplus(raw.detach())
    torch.testing.assert_close(y, ssd(**{**t, "dt": dt.clamp(least, greatest)}, backend=backend))
    (grad,) = torch.autograd.grad(y.sum(), [raw])
    inside = (dt > least) & (dt < greatest)
    assert inside.any()
    assert (~inside).any()
    assert (grad[~inside] == 0).all()
    assert (grad[inside] != 0).all()


# Every backend against the definition.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_backend_agrees_with_the_reference(backend: str, dtype: torch.dtype, groups: int) -> None:
    assert_backend_agrees(scan, make(dtype=dtype, groups=groups), backend, dtype)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"groups": 2}),
        (torch.float16, {"groups": 6, "optional": False}),
        (torch.float32, {"batch": 1, "length": 40, "heads": 2, "headdim": 70, "state": 20}),  # blocks of the headdim
        (torch.float32, {"batch": 1, "length": 70, "heads": 1, "headdim": 3, "state": 33}),
        (torch.float32, {"length": 0}),
        (torch.float32, {"length": 1}),
        (torch.float32, {"batch": 0}),
    ],
)
def test_gpu_agrees_with_the_reference(backend: str, dtype: torch.dtype, shape: dict) -> None:
    assert_backend_agrees(scan, make(dtype=dtype, **shape), backend, dtype)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("lengths", [[], [0], [5, 0, 33, 16], [270, 3]])
def test_packed_sequences_on_the_gpu_give_what_separate_ones_give(backend: str, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    tensors = make(1, sum(lengths), 2, sequences=len(lengths), groups=2)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": bounds}, backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
def test_segments_of_a_long_sequence_hand_their_state_on(backend: str) -> None:
    assert_backend_agrees(scan, make(1, 270, 1, groups=1), backend, torch.float32)  # 17 chunks: three segments


@pytest.mark.parametrize("backend", TRITON)
def test_gpu_gives_the_same_bits_each_time(backend: str) -> None:
    tensors = leaves_of(make(1, 60, 4, groups=2, dtype=torch.bfloat16))
    found = []
    for _ in range(2):
        outputs = scan(**tensors, backend=backend)
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in outputs), list(tensors.values()))
        found.append((*outputs, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_gpu_agrees_on_sequences_of_one_chunk(backend: str, initial: bool, final: bool) -> None:
    tensors = make(2, 13, 2, 4, 33, 2)  # 33 numbers of a state: more than a product of float32 takes at once
    if not initial:
        del tensors["initial_state"]
    operation = scan if final else lambda **t: (ssd(**t, dt_softplus=True),)
    assert_backend_agrees(operation, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
def test_gpu_keeps_nothing_before_the_only_chunk_of_a_sequence(backend: str) -> None:
    tensors = make(2, 13, 2, 4, 33)
    del tensors["initial_state"]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        scan(**leaves_of(tensors), backend=backend)
    assert kept[-1] == (0, 2, 33, 4)


@pytest.mark.skipif(not TRITON, reason="Triton can't run here")
@pytest.mark.parametrize(("allowed", "products"), [(False, "tf32x3"), (True, "tf32")])
def test_gpu_forms_products_of_float32_in_tf32_where_torch_may(allowed: bool, products: str) -> None:
    from mambakit.ops.inputs import SsdInputs
    from mambakit.ops.triton.ssd_launches import launches_of

    t = make(1, 20, 2)
    inputs = SsdInputs(*(t.get(name) for name in SsdInputs._fields[:9]), None, True, 0.0, math.inf, CHUNK)
    switch = torch.backends.cuda.matmul
    before, switch.allow_tf32 = switch.allow_tf32, allowed
    try:
        assert launches_of(inputs)[0].shape.precision == products
    finally:
        switch.allow_tf32 = before


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"state": 300}])
def test_what_the_gpu_does_not_take_is_refused_by_name_and_served_by_the_next(backend: str, change: dict) -> None:
    tensors = make(1, 3, 1, **change)
    with pytest.raises(ValueError, match="the GPU's ssd"):
        scan(**tensors, backend=backend)
    assert scan(**tensors)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(0, 3),
    length=st.one_of(st.integers(0, 3), st.integers(CHUNK - 1, 2 * CHUNK + 1)),
    share=st.integers(1, 3),
    headdim=st.integers(1, 5),
    state=st.integers(1, 5),
    groups=st.integers(1, 3),
    optional=st.booleans(),
)
@settings(max_examples=40)
def test_backend_agrees_at_any_shape(
    backend: str, batch: int, length: int, share: int, headdim: int, state: int, groups: int, optional: bool
) -> None:
    tensors = make(batch, length, share * groups, headdim, state, groups, optional=optional)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("chunk_size", [1, 7, 45, 1000, None])
def test_chunk_size_does_not_change_the_result(backend: str, chunk_size: int | None) -> None:
    operation = functools.partial(ssd, dt_softplus=True, return_final_state=True, chunk_size=chunk_size)
    assert_backend_agrees(operation, make(1, heads=4, groups=2), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=st.lists(st.integers(0, 40), min_size=0, max_size=6))
@settings(max_examples=20)
def test_packed_sequences_give_what_separate_ones_give(backend: str, lengths: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    tensors = make(1, sum(lengths), sequences=len(lengths), groups=2)
    assert_backend_agrees(scan, {**tensors, "cu_seqlens": bounds}, backend, torch.float32)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_strided_and_transposed_inputs_are_read_where_they_lie(backend: str) -> None:
    batch, length, heads, headdim, state = 2, 40, 2, 4, 3
    tensors = make(batch, length, heads, headdim, state)
    tensors["x"], tensors["z"] = torch.randn(batch, length, heads, 2 * headdim).chunk(2, dim=-1)
    tensors["dt"] = torch.randn(batch, heads, length).transpose(1, 2)
    tensors["B"], tensors["C"] = torch.randn(batch, length, 2, 2 * state)[..., ::2].split(1, dim=2)
    tensors["D"] = torch.randn(headdim, heads).t()
    tensors["initial_state"] = torch.randn(state, headdim, heads, batch).permute(3, 2, 1, 0)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(backend: str) -> None:
    tensors = make(1, 5, 2, 2, 2, dtype=torch.float64)
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *args: ssd(
            **dict(zip(names, args, strict=True)),
            dt_softplus=True,
            return_final_state=True,
            chunk_size=2,
            backend=backend,
        ),
        list(leaves_of(tensors).values()),
    )


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_gradient_of_the_final_state_alone(backend: str) -> None:
    tensors = leaves_of(make(heads=2))
    grads = {}
    for name in (backend, "reference"):
        _, h = scan(**tensors, backend=name)
        grads[name] = torch.autograd.grad(h.square().sum(), [tensors["x"], tensors["A"], tensors["initial_state"]])
    for a, b in zip(grads[backend], grads["reference"], strict=True):
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("step", [0.0, 1e-8, 1.0, 1e3, 1e30])
def test_extreme_steps_stay_finite(backend: str, step: float) -> None:
    tensors = make(1, optional=False)
    tensors["x"] = torch.full_like(tensors["x"], 1e-3)
    tensors["dt"] = torch.full_like(tensors["dt"], step)
    tensors["A"] = -torch.logspace(-6, 10, 6)  # with the largest step, a decay of exp(-inf)
    leaves = leaves_of(tensors)
    y, h = ssd(**leaves, return_final_state=True, chunk_size=CHUNK, backend=backend)
    grads = torch.autograd.grad((y / 1e30).sum() + (h / 1e30).sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (y, h, *grads))


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_small_decays_after_a_step_that_forgets_keep_their_digits(backend: str) -> None:
    tensors = make(1, 256, 1, 1, 1, optional=False)
    tensors["B"], tensors["C"] = torch.ones(1, 256, 1, 1), torch.ones(1, 256, 1, 1)
    tensors["dt"] = torch.full((1, 256, 1), 1e-3)
    tensors["dt"][:, ::4] = 90.0  # exp(-90 * 64) is zero
    tensors["A"] = torch.tensor([-64.0])
    operation = functools.partial(ssd, return_final_state=True, chunk_size=256)
    assert_backend_agrees(operation, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_growing_state_agrees_where_it_does_not_overflow(backend: str) -> None:
    tensors = make(1, heads=2)
    tensors["A"] = torch.full((2,), 0.05)
    assert_backend_agrees(scan, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_nan_in_one_head_stays_in_that_head_and_comes_no_earlier(backend: str) -> None:
    tensors = make(optional=False)
    tensors["x"][0, 20, 2] = math.nan
    y, h = scan(**tensors, backend=backend)
    assert y[0, 20:, 2].isnan().all()
    assert h[0, 2].isnan().all()
    y[0, CHUNK:, 2], h[0, 2] = 0, 0  # within its chunk a product with zero spreads it
    assert y.isfinite().all()
    assert h.isfinite().all()


def test_nothing_larger_than_the_states_between_chunks_is_kept() -> None:
    batch, length, heads, headdim, state = 1, 512, 4, 8, 16
    tensors = leaves_of(make(batch, length, heads, headdim, state))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ssd(**tensors, dt_softplus=True, chunk_size=64)
    states = (length // 64 + 1) * heads * headdim * state
    assert max(kept) == max(states, batch * length * heads * headdim)


def test_cpu_backend_gives_the_same_bits_for_any_number_of_threads() -> None:
    tensors = leaves_of(make(2, 90, 6, 16, 32, groups=2))
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
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)


# Steps, mixed dtypes, operators.


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_steps_give_what_the_whole_gives(backend: str) -> None:
    t = make(length=9, dtype=torch.float64)
    whole, last = scan(**t, backend=backend)
    h = t["initial_state"]
    for i in range(9):
        rows = {name: t[name][:, i] for name in ("x", "dt", "B", "C", "z")}
        parameters = {name: t[name] for name in ("A", "D", "dt_bias")}
        y, h = ssd_step(h, **rows, **parameters, dt_softplus=True, backend=backend)
        torch.testing.assert_close(y, whole[:, i])
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(("dtype", "groups", "optional"), [(torch.float32, 2, True), (torch.bfloat16, 1, False)])
def test_one_step_on_the_gpu_is_a_sequence_of_length_one(
    backend: str, dtype: torch.dtype, groups: int, optional: bool
) -> None:
    t = make(2, 1, 4, 19, 21, groups, dtype, optional=optional)
    t["initial_state"] = torch.randn(2, 4, 21, 19).transpose(2, 3)
    whole, last = scan(**t, backend="reference")
    rows = {name: t[name][:, 0] for name in ("x", "dt", "B", "C", "z") if name in t}
    parameters = {name: t.get(name) for name in ("A", "D", "dt_bias")}
    y, h = ssd_step(t["initial_state"], **rows, **parameters, dt_softplus=True, backend=backend)
    assert error(y, whole[:, 0]) <= OUTPUT_BOUND[dtype]
    assert error(h, last) <= OUTPUT_BOUND[torch.float32]


def test_one_D_for_each_head_serves_all_its_channels() -> None:
    t = make()
    t["D"] = torch.randn(6, requires_grad=True)
    y = scan(**t)[0]
    expected = scan(**{**t, "D": t["D"][:, None].expand(6, 4)})[0]
    assert torch.equal(y, expected)
    assert torch.autograd.grad(y.sum(), [t["D"]])[0].shape == (6,)


def test_activations_of_mixed_dtypes_are_promoted() -> None:
    t = make(optional=False)
    t["x"] = t["x"].to(torch.bfloat16)
    y, h = scan(**t)
    assert y.dtype == torch.float32
    assert h.dtype == torch.float32
    assert error(y, scan(**t, backend="reference")[0]) < 1e-5


def test_operator_passes_opcheck() -> None:
    t = make(length=5, heads=2)
    leaves = [None if x is None else x.requires_grad_() for x in t.values()]
    settings = (True, 0.0, math.inf, 4, True)  # a chunk size that leaves no slot of the kept states unused
    for backend in EVERYWHERE:
        torch.library.opcheck(torch.ops.mambakit.ssd.default, (*leaves, None, *settings, backend))


def test_three_axes_of_B_and_C_are_one_group() -> None:
    t = make()
    one = scan(**t)[0]
    t["B"], t["C"] = t["B"].squeeze(2), t["C"].squeeze(2)
    assert torch.equal(scan(**t)[0], one)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 45, 6)}, "x must have shape"),
        ({"dt": torch.randn(2, 45, 7)}, "dt must have shape"),
        ({"A": torch.randn(6, 3)}, "A must have shape"),
        ({"B": torch.randn(2, 45, 4, 3)}, "groups of B must divide heads"),
        ({"B": torch.randn(2, 45)}, "B must have shape"),
        ({"C": torch.randn(2, 45, 1, 4)}, "C must have shape"),
        ({"D": torch.randn(5)}, "D must have shape"),
        ({"z": torch.randn(2, 44, 6, 4)}, "z must have shape"),
        ({"dt_bias": torch.randn(1, 6)}, "dt_bias must have shape"),
        ({"initial_state": torch.randn(1, 6, 4, 3)}, "initial_state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 45])}, "packed sequences need a batch of 1"),
        ({"dt_limit": (1.0, 0.0)}, "dt_limit must be an interval"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"backend": "cuda"}, "is not a backend"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**make(), **change})


@pytest.mark.parametrize("bounds", [[0, 44], [1, 45], [0, 30, 20, 45]])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_bounds_that_do_not_rise_to_the_length_are_refused(bounds: list[int], backend: str) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the length 45"):
        ssd(**make(1, optional=False), cu_seqlens=torch.tensor(bounds), backend=backend)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="x must be float32"):
        ssd(**{**make(optional=False), "x": torch.ones(2, 45, 6, 4, dtype=torch.int64)})
