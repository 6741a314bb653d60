"""The causal convolution: its definition against torch's own, every backend against the definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.agreement import DTYPES, assert_backend_agrees
from tests.ops.backends import BACKENDS, TRITON
from torch import Tensor

from mambakit.ops import causal_conv1d, causal_conv1d_step, cpu


def conv(**tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return causal_conv1d(**tensors, activation="silu", return_final_state=True)


def make(
    batch: int = 2,
    length: int = 45,
    channels: int = 6,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
) -> dict[str, Tensor | None]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Tensor | None] = {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, width, dtype=wide),
    }
    if optional:
        tensors["bias"] = torch.randn(channels, dtype=wide)
        tensors["initial_state"] = torch.randn(batch, width - 1, channels).to(dtype)
    return tensors


def test_reference_is_torchs_depthwise_convolution() -> None:
    t = make(dtype=torch.float64)
    history = torch.cat([t["initial_state"], t["x"]], dim=1).transpose(1, 2)
    expected = F.conv1d(history, t["weight"][:, None], t["bias"], groups=6).transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(**t, backend="reference"), expected)
    torch.testing.assert_close(conv(**t, backend="reference")[0], F.silu(expected))


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backend_agrees_with_the_reference(backend: str, dtype: torch.dtype) -> None:
    assert_backend_agrees(conv, make(dtype=dtype), backend, dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_backend_agrees_without_an_activation(backend: str) -> None:
    def plain(**tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**tensors, return_final_state=True)

    assert_backend_agrees(plain, make(), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(0, 3),
    length=st.one_of(st.integers(0, 5), st.integers(126, 131), st.integers(255, 258)),
    channels=st.integers(1, 70),
    width=st.integers(1, 6),
    optional=st.booleans(),
)
@settings(max_examples=40)
def test_backend_agrees_at_any_shape(
    backend: str, batch: int, length: int, channels: int, width: int, optional: bool
) -> None:
    assert_backend_agrees(conv, make(batch, length, channels, width, optional=optional), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@given(lengths=st.lists(st.one_of(st.integers(0, 5), st.just(130)), min_size=0, max_size=6))
@settings(max_examples=20)
def test_packed_sequences_give_what_separate_ones_give(backend: str, lengths: list[int]) -> None:
    tensors = make(1, sum(lengths))
    tensors["initial_state"] = torch.randn(len(lengths), 3, 6)
    tensors["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    assert_backend_agrees(conv, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_strided_and_transposed_inputs_are_read_where_they_lie(backend: str) -> None:
    tensors = make()
    tensors["x"] = torch.randn(2, 45, 18).chunk(3, dim=-1)[1]
    assert_backend_agrees(conv, tensors, backend, torch.float32)
    tensors["x"] = torch.randn(2, 6, 45).transpose(1, 2)
    tensors["weight"] = torch.randn(4, 6).t()
    assert_backend_agrees(conv, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "optional"),
    [
        (2, 0, 3, 4, True),
        (1, 1, 5, 2, True),
        (3, 2, 1, 6, True),
        (1, 259, 70, 1, False),
        (0, 3, 2, 3, True),
        (2, 75, 64, 4, True),  # whole blocks of channels
        (1, 130, 32, 9, True),  # a window that takes the registers of many rows
    ],
)
def test_kernel_of_the_gpu_agrees_at_odd_shapes(
    backend: str, batch: int, length: int, channels: int, width: int, optional: bool
) -> None:
    assert_backend_agrees(conv, make(batch, length, channels, width, optional=optional), backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("lengths", [[3, 0, 130, 2], [], [0], [5, 5]])
def test_kernel_of_the_gpu_keeps_packed_sequences_apart(backend: str, lengths: list[int]) -> None:
    tensors = make(1, sum(lengths))
    tensors["initial_state"] = torch.randn(len(lengths), 3, 6)
    tensors["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    assert_backend_agrees(conv, tensors, backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
def test_kernel_of_the_gpu_widens_the_weights_that_it_reads(backend: str) -> None:
    t = make(dtype=torch.bfloat16)
    narrow = {**t, "weight": t["weight"].bfloat16().requires_grad_(), "bias": t["bias"].bfloat16().requires_grad_()}
    wide = {**t, **{name: narrow[name].detach().float().requires_grad_() for name in ("weight", "bias")}}
    y, expected = (causal_conv1d(**inputs, activation="silu", backend=backend) for inputs in (narrow, wide))
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for name in ("weight", "bias"):  # to a unit of the last place, which Triton's interpreter cuts off
        assert narrow[name].grad.dtype == torch.bfloat16
        torch.testing.assert_close(narrow[name].grad.float(), wide[name].grad, rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", TRITON)
def test_kernel_of_the_gpu_refuses_more_taps_than_its_registers_hold(backend: str) -> None:
    tensors = make(1, 3, 2, 17)
    with pytest.raises(ValueError, match="16 taps at most"):
        conv(**tensors, backend=backend)
    assert conv(**tensors)[0].shape == (1, 3, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(backend: str) -> None:
    tensors = make(1, 5, 2, 3, dtype=torch.float64)
    names = list(tensors)
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
    assert torch.autograd.gradcheck(lambda *args: conv(**dict(zip(names, args, strict=True)), backend=backend), leaves)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON, "reference"])
def test_final_state_of_one_chunk_starts_the_next(backend: str) -> None:
    t = make(dtype=torch.float64)
    whole, last = conv(**t, backend=backend)
    first, state = conv(**{**t, "x": t["x"][:, :2]}, backend=backend)
    second, state = conv(**{**t, "x": t["x"][:, 2:], "initial_state": state}, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON, "reference"])
def test_steps_give_what_the_whole_gives(backend: str) -> None:
    t = make(length=6, dtype=torch.float64)
    whole, last = conv(**t, backend=backend)
    state = t["initial_state"]
    for i in range(6):
        y, state = causal_conv1d_step(state, t["x"][:, i], t["weight"], t["bias"], activation="silu", backend=backend)
        torch.testing.assert_close(y, whole[:, i])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("isa", cpu.native.instruction_sets() if cpu.AVAILABLE else [])
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    best = cpu.native.instruction_set()
    cpu.native.use_instruction_set(isa)
    try:
        assert_backend_agrees(conv, make(channels=70, dtype=torch.float16), "cpu", torch.float16)
    finally:
        cpu.native.use_instruction_set(best)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    tensors = {name: t.requires_grad_() for name, t in make(3, 300, 20).items() if t is not None}
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, state = conv(**tensors, backend="cpu")
        results.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), list(tensors.values()))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operator_passes_opcheck() -> None:
    leaves = [t.requires_grad_() for t in make(length=5).values() if t is not None]
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.mambakit.causal_conv1d.default, (*leaves, None, True, True, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(45, 6)}, "x must have shape"),
        ({"weight": torch.randn(6, 1, 4)}, "weight must have shape"),
        ({"weight": torch.randn(5, 4)}, "weight must have shape"),
        ({"bias": torch.randn(5)}, "bias must have shape"),
        ({"initial_state": torch.randn(2, 4, 6)}, "initial_state must have shape"),
        ({"activation": "relu"}, "activation must be None, 'silu' or 'swish'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make(), **change})
