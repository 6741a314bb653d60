"""Causal attention: against the formula, its positions, and states of sequences of different lengths."""

import math

import pytest
import torch
from torch import Tensor

from mambakit.nn import Attention


def test_parameters_are_named_and_shaped_as_in_public_checkpoints() -> None:
    mixer = Attention(32, n_heads=4, n_kv_heads=2, head_dim=16, d_conv=4)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": ((4 + 2 * 2) * 16, 32),
        "conv1d.weight": ((4 + 2 * 2) * 16, 1, 4),
        "out_proj.weight": (32, 64),
    }


def test_without_rotation_it_is_softmax_attention_over_the_past() -> None:
    mixer = Attention(8, n_heads=2, rotary_dim=0, dtype=torch.float64)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = mixer.in_proj(x)[0].view(6, 3, 2, 4).unbind(1)
    heads = []
    for h in range(2):
        scores = q[:, h] @ k[:, h].t() / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, h])
    torch.testing.assert_close(mixer(x)[0][0], mixer.out_proj(torch.cat(heads, dim=-1)))


def test_rotation_makes_scores_depend_on_the_distance_alone() -> None:
    mixer = Attention(8, n_heads=1, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        at = [torch.tensor([[position]]) for position in (query_at, key_at)]
        return (mixer._rotate(q, at[0]) * mixer._rotate(k, at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert not torch.isclose(score(7, 3), score(8, 3))


def test_states_of_different_lengths_step_on_as_one_batch() -> None:
    mixer = Attention(8, n_heads=2, d_conv=3, dtype=torch.float64)
    x, more = torch.randn(1, 12, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    _, state = mixer(x, cu_seqlens=torch.tensor([0, 4, 12]))
    assert state.positions.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1], list(range(8))]
    y, state = mixer(more[:, :2], state)
    last, state = mixer(more[:, 2:], state)
    for i, before in enumerate((x[:, :4], x[:, 4:])):
        expected, alone = mixer(torch.cat([before, more[i : i + 1]], dim=1))
        torch.testing.assert_close(torch.cat([y, last], dim=1)[i], expected[0, -3:])
        torch.testing.assert_close(state.of_sequence(i).keys, alone.keys)
        assert torch.equal(state.of_sequence(i).positions, alone.positions)


def test_a_pack_of_no_sequences() -> None:
    y, state = Attention(8, n_heads=2)(torch.randn(1, 0, 8), cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 8)
    assert state.keys.shape == (0, 0, 2, 4)


def test_step_is_the_layer_on_one_token() -> None:
    mixer = Attention(8, n_heads=2)
    x = torch.randn(2, 3, 8)
    _, state = mixer(x[:, :2])
    y, _ = mixer.step(x[:, 2], state)
    torch.testing.assert_close(y, mixer(x)[0][:, 2])


def test_bfloat16_in_and_out() -> None:
    mixer = Attention(8, n_heads=2, dtype=torch.bfloat16)
    y, state = mixer(torch.randn(2, 20, 8, dtype=torch.bfloat16))
    assert y.dtype == state.keys.dtype == torch.bfloat16


def test_compiled_whole_and_equal() -> None:
    mixer = Attention(8, n_heads=2)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, 8)
    y, state = compiled(x)
    torch.testing.assert_close(y, mixer(x)[0])
    torch.testing.assert_close(compiled(x, state)[0], mixer(x, state)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model = 8"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads = 2"),
        ({"rotary_dim": 3}, "rotary_dim must be even"),
        ({"rotary_dim": 6}, "at most head_dim = 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(8, **{"n_heads": 2, **change})
