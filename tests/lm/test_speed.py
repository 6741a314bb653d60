"""What `lm bench` measures: the bytes that a step reads, the products of a prompt, and figures that follow."""

import pytest
import torch
from tests.lm.small import model_of

from mambakit.errors import DataError
from mambakit.lm.quantisation import quantise
from mambakit.lm.speed import SHAPES, Products, Speed, measure, random_model, read_bytes


def small(tied: bool = True):
    return model_of("mamba", hidden_size=32, tie_word_embeddings=tied)


def test_figures_follow_from_what_was_measured() -> None:
    speed = Speed("int8", 2, 100, 4, 10**6, 0.5, 0.25, 0.002, 1e9, None)
    assert speed.prompt_tokens_per_second == 400
    assert speed.over_products == 2
    assert speed.tokens_per_second == 1000
    assert speed.bound_tokens_per_second == 2000
    assert speed.share_of_bound == 0.5
    assert speed.record()["share_of_bound"] == 0.5


def test_a_step_reads_every_weight_once_and_of_an_untied_embedding_next_to_nothing() -> None:
    tied, untied = small(), small(tied=False)
    parameters = sum(parameter.nbytes for parameter in tied.parameters())
    assert read_bytes(tied) == parameters == read_bytes(untied)
    assert read_bytes(quantise(small(), "int8")) < parameters / 2


def test_the_products_are_those_of_the_model() -> None:
    calls: list[tuple[tuple[int, ...], tuple[int, int]]] = []
    model = small()
    products = Products(model, 2, 7)
    from mambakit import ops

    original = ops.linear
    ops.linear = lambda x, weight, bias=None: calls.append((tuple(x.shape[:2]), tuple(weight.shape)))
    try:
        products()
        wanted = sorted(calls)
        calls.clear()
        ops.linear = lambda x, weight, bias=None: (
            calls.append((tuple(x.shape[:2]), tuple(weight.shape))) or original(x, weight, bias)
        )
        with torch.no_grad():
            model(torch.randint(40, (2, 7)), logits_to_keep=1)
    finally:
        ops.linear = original
    assert sorted(calls) == wanted


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_measurement_has_every_figure(weights: str) -> None:
    turns: list[None] = []
    speed = measure(
        lambda: quantise(small(), weights),
        weights,
        2,
        prompt=5,
        new_tokens=2,
        turns=2,
        on_turn=lambda: turns.append(None),
    )
    assert len(turns) == 3, "one to warm up"
    assert (speed.weights, speed.batch, speed.prompt, speed.new_tokens) == (weights, 2, 5, 2)
    assert min(speed.first_token_seconds, speed.products_seconds, speed.step_seconds, speed.read_rate) > 0


def test_sizes_and_shapes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(DataError, match="new_tokens must be at least 1"):
        measure(small, "float32", 1, new_tokens=0)
    with pytest.raises(DataError, match="mamba-130m, mamba2-130m"):
        random_model("mamba-1b")


def test_the_shapes_have_130_million_parameters() -> None:
    from mambakit.lm import MambaConfig, MambaForCausalLM

    for settings in SHAPES.values():
        with torch.device("meta"):
            assert round(MambaForCausalLM(MambaConfig(**settings)).num_parameters() / 1e6) in range(128, 131)
