"""The functions of causal_conv1d against their definition, with each option that they take."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tests.compat import definitions
from tests.compat.agreement import assert_agrees, assert_same

from mambakit.compat import NotServed
from mambakit.compat.convolutions import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from mambakit.errors import DataError

BATCH, CHANNELS, WIDTH, LENGTH = 2, 5, 4, 9

randn = functools.partial(torch.randn, dtype=torch.float64)


def tensors(**further: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": randn(BATCH, CHANNELS, LENGTH), "weight": randn(CHANNELS, WIDTH), "bias": randn(CHANNELS), **further}


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_the_convolution_looks_back_only(activation: str | None) -> None:
    assert_agrees(causal_conv1d_fn, definitions.convolution, tensors(), activation=activation)


def test_the_convolution_goes_on_from_the_inputs_before_it() -> None:
    before = tensors(initial_states=randn(BATCH, CHANNELS, WIDTH - 1))
    assert_agrees(causal_conv1d_fn, definitions.convolution, before, activation="silu")


def test_packed_sequences_do_not_see_one_another_and_padding_is_zero() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, -1, -1, -1]], dtype=torch.int32)
    packed = tensors(seq_idx=seq_idx, initial_states=randn(BATCH, CHANNELS, WIDTH - 1))
    assert_agrees(causal_conv1d_fn, definitions.convolution, packed, activation="silu")


def test_the_final_states_are_the_last_inputs_in_the_place_given() -> None:
    given = tensors()
    place = torch.full((BATCH, CHANNELS, WIDTH - 1), float("nan"), dtype=torch.float64)
    _, final = causal_conv1d_fn(**given, return_final_states=True, final_states_out=place)
    assert final.data_ptr() == place.data_ptr()
    assert torch.equal(place, given["x"][..., 1 - WIDTH :])


def test_final_states_of_a_short_row_begin_with_zeros() -> None:
    x = randn(BATCH, CHANNELS, 2)
    _, final = causal_conv1d_fn(x, randn(CHANNELS, WIDTH), return_final_states=True)
    assert torch.equal(final, F.pad(x, (1, 0)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_output_lies_in_memory_as_the_input_does(channels_last: bool) -> None:
    x = randn(BATCH, LENGTH, CHANNELS).transpose(1, 2) if channels_last else randn(BATCH, CHANNELS, LENGTH)
    assert causal_conv1d_fn(x, randn(CHANNELS, WIDTH)).stride() == x.stride()


def test_what_cannot_be_honoured_is_refused() -> None:
    x, weight = randn(BATCH, CHANNELS, LENGTH), randn(CHANNELS, WIDTH)
    with pytest.raises(NotServed, match="activation must be None, 'silu' or 'swish', got 'relu'"):
        causal_conv1d_fn(x, weight, activation="relu")
    with pytest.raises(NotServed, match="packed"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(BATCH, LENGTH).int(), return_final_states=True)
    with pytest.raises(NotServed, match="final_states_out"):
        causal_conv1d_fn(x, weight, final_states_out=randn(BATCH, CHANNELS, WIDTH - 1))
    with pytest.raises(DataError, match="conv_state must hold"):
        causal_conv1d_update(x[..., 0], randn(BATCH, CHANNELS, WIDTH - 2), weight)


@pytest.mark.parametrize("state_len", [WIDTH - 1, WIDTH, WIDTH + 2])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("several", [1, 2, 5])
def test_steps_give_what_the_whole_sequence_gives(state_len: int, ring: bool, several: int) -> None:
    given = tensors()
    whole = definitions.convolution(**given, activation="silu")
    state = torch.zeros(BATCH, CHANNELS, state_len, dtype=torch.float64)
    for begin in range(0, LENGTH, several):
        seen = torch.full((BATCH,), begin, dtype=torch.int32) if ring else None
        x = given["x"][..., begin : begin + several]
        y = causal_conv1d_update(x, state, given["weight"], given["bias"], "silu", seen)
        assert_same(y, whole[..., begin : begin + several])
    places = torch.arange(LENGTH - state_len, LENGTH)
    expected = given["x"][..., places]
    assert torch.equal(state[..., places % state_len] if ring else state, expected)


def test_a_step_of_one_input_has_no_axis_of_length() -> None:
    state = randn(BATCH, CHANNELS, WIDTH)
    x, weight = randn(BATCH, CHANNELS), randn(CHANNELS, WIDTH)
    window = torch.cat([state[..., 1:], x[..., None]], -1)
    y = causal_conv1d_update(x, state, weight)
    assert_same(y, (window * weight).sum(-1))
    assert torch.equal(state, window)


def test_steps_find_their_states_by_index_and_leave_padding_alone() -> None:
    states = randn(4, CHANNELS, WIDTH)
    before = states.clone()
    x, weight = randn(3, CHANNELS), randn(CHANNELS, WIDTH)
    y = causal_conv1d_update(x, states, weight, conv_state_indices=torch.tensor([2, -1, 0], dtype=torch.int32))
    for row, place in ((0, 2), (2, 0)):
        own = before[place : place + 1].clone()
        assert_same(y[row : row + 1], causal_conv1d_update(x[row : row + 1], own, weight))
        assert torch.equal(states[place], own[0])
    assert not y[1].any()
    assert torch.equal(states[[1, 3]], before[[1, 3]])


def test_states_of_packed_sequences_are_their_last_inputs() -> None:
    x = randn(9, CHANNELS)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), WIDTH)
    assert torch.equal(states[0], F.pad(x[:2].T, (2, 0)))
    assert not states[1].any()
    assert torch.equal(states[2], x[5:].T)
