"""The GPU's kernels of Mamba-3 against the definition; without a GPU in Triton's interpreter, so few and small."""

import contextlib
import importlib
from typing import Any

import pytest
import torch
from tests.ops.agreement import assert_backend_agrees, error
from tests.ops.backends import TRITON
from tests.ops.test_mamba3_scan import STATE, WITHOUT_LENGTH, make, scan, scan_with_state
from torch import Tensor

from mambakit.ops import Mamba3State, mamba3_step

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton can't run here")


def agrees(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    def run(**given: Any) -> tuple[Tensor, ...]:
        return scan(**given, **options)

    assert_backend_agrees(run, tensors, "triton", dtype)


def test_one_input_a_step_agrees_with_the_reference() -> None:
    agrees(make(1, 21, 2, groups=2))


def test_several_inputs_a_step_agree_with_the_reference() -> None:
    tensors = make(1, 21, 2, rank=3)
    tensors["angles"] = torch.randn(1, 21, 2, 4)
    tensors["initial_angle"] = torch.randn(1, 2, 4)
    agrees(tensors, interleaved=False)


def test_half_precision_agrees_with_the_reference() -> None:
    agrees(make(1, 18, 2, rank=2, dtype=torch.float16), torch.float16)


def test_an_output_for_each_rank_agrees_with_the_reference() -> None:
    tensors = make(1, 17, 2, rank=2)
    tensors.pop("mimo_o")
    agrees(tensors)


def test_packed_sequences_with_empty_ones_agree_with_the_reference() -> None:
    bounds = torch.tensor([0, 0, 7, 7, 25])
    agrees({**make(1, 25, 2, sequences=4), "cu_seqlens": bounds})


def test_a_sequence_cut_into_segments_agrees_with_the_reference() -> None:
    agrees(make(1, 140, 2, headdim=17, state=34, pairs=9))


@pytest.mark.parametrize("rank", [None, 2])
def test_several_blocks_of_channels_agree_with_the_reference(rank: int | None) -> None:
    agrees(make(1, 18, 1, headdim=70, rank=rank))


@pytest.mark.parametrize("wanted", [False, True], ids=["y alone", "with the final state"])
@pytest.mark.parametrize(("rank", "length"), [(None, 5), (None, 18), (3, 7)])
def test_short_sequences_that_begin_afresh_agree_with_the_reference(
    rank: int | None, length: int, wanted: bool
) -> None:
    tensors = make(3, length, 2, rank=rank, groups=2)
    for name in STATE:
        tensors.pop(name)

    def run(**given: Any) -> tuple[Tensor, ...]:
        results = scan(**given, chunk_size=64)
        return results if wanted else results[:1]

    assert_backend_agrees(run, tensors, "triton", torch.float32)


def test_short_sequences_from_a_state_that_nothing_follows_agree_with_the_reference() -> None:
    assert_backend_agrees(lambda **given: scan(**given)[:1], make(2, 9, 2), "triton", torch.float32)


@pytest.mark.parametrize("length", [0, 1])
def test_hardly_any_steps_agree_with_the_reference(length: int) -> None:
    agrees(make(2, length, 2))


def test_a_step_that_forgets_everything_leaves_later_decays_exact() -> None:
    tensors = make(1, 21, 2, optional=False)
    tensors["A"] = torch.full_like(tensors["A"], -1e-3)
    tensors["A"][:, 3] = -1e6
    agrees(tensors)


@pytest.mark.parametrize(("rank", "interleaved"), [(None, True), (2, False)])
def test_steps_give_what_the_whole_gives(rank: int | None, interleaved: bool) -> None:
    tensors = make(length=4, rank=rank, groups=2)
    whole, last = scan_with_state(**tensors, interleaved=interleaved, backend="reference")
    state = Mamba3State(*(tensors.pop(name) for name in STATE))
    constant = {name: tensors.pop(name) for name in WITHOUT_LENGTH if name in tensors}
    for i in range(4):
        step = {name: t[:, i] for name, t in tensors.items()}
        y, state = mamba3_step(state, **step, **constant, dt_softplus=True, interleaved=interleaved, backend="triton")
        assert error(y, whole[:, i]) < 1e-5
    for a, b in zip(state, last, strict=True):
        assert error(a, b) < 1e-5


def test_bounds_that_lie_apart_are_read_where_they_lie() -> None:
    bounds = torch.tensor([0, 99, 4, 99, 9])[::2]
    agrees({**make(1, 9, 2, sequences=2), "cu_seqlens": bounds})


def test_sequences_of_one_step_agree_whatever_the_stride_of_their_length() -> None:
    tensors = make(3, 1, 2)
    for name in ("x", "B", "C", "z"):
        steps_first = torch.randn(1, 3, *tensors[name].shape[2:])
        tensors[name] = steps_first.transpose(0, 1)
    agrees(tensors)


@pytest.mark.parametrize("name", ["mamba3", "mamba3_weights", "mamba3_step"])
def test_kernels_are_launched_on_the_device_of_their_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module(f"mambakit.ops.triton.{name}")
    asked: list[torch.device] = []

    def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
        asked.append(tensor.device)
        return contextlib.nullcontext()

    monkeypatch.setattr(kernels, "on_device_of", on_device_of)
    tensors = make(1, 2, 1)
    _, state = scan_with_state(**tensors, backend="triton")
    arguments = {n: t if n in WITHOUT_LENGTH else t[:, 0] for n, t in tensors.items() if n not in STATE}
    mamba3_step(state, **arguments, dt_softplus=True, backend="triton")
    assert asked == [tensors["x"].device]


def test_float64_is_refused_and_left_to_the_next_backend() -> None:
    with pytest.raises(ValueError, match="its kernels have no float64"):
        scan(**make(1, 3, dtype=torch.float64), backend="triton")
