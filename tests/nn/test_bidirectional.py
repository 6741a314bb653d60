"""Reading from both ends."""

import itertools

import pytest
import torch

from mambakit.nn import S4D, Bidirectional, Mamba


def both() -> Bidirectional:
    return Bidirectional(Mamba(8, d_state=3, dtype=torch.float64), S4D(8, 4, dtype=torch.float64))


def test_it_is_the_sum_of_both_directions() -> None:
    layer, x = both(), torch.randn(2, 20, 8, dtype=torch.float64)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.forward_layer(x)[0] + layer.backward_layer(x.flip(1))[0].flip(1))
    assert state is None


def test_packed_sequences_are_reversed_each_on_its_own() -> None:
    layer, x = both(), torch.randn(1, 20, 8, dtype=torch.float64)
    bounds = [0, 7, 7, 8, 20]
    y, _ = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in itertools.pairwise(bounds):
        torch.testing.assert_close(y[:, start:end], layer(x[:, start:end])[0])


def test_a_state_is_refused() -> None:
    layer, x = both(), torch.randn(1, 5, 8, dtype=torch.float64)
    _, state = layer.forward_layer(x)
    with pytest.raises(ValueError, match="state must be None"):
        layer(x, state)
