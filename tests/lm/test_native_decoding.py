"""Decoding in one native call, from a token to logits, beside the layers' own steps on the same weights."""

from typing import Any

import pytest
import torch
from tests.lm.small import FAMILIES, VOCABULARY, model_of, tokens
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mambakit.lm import Decoder, MambaForCausalLM, quantise
from mambakit.lm.quantisation import WEIGHTS
from mambakit.nn import QuantisedEmbedding, QuantisedLinear, Stepper, native_stack
from mambakit.ops import cpu
from mambakit.ops.quantised_linear import FORMATS, QuantisedMatrix, quantise_matrix, quantised_linear

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the extension is not built")
NATIVE = [family for family in FAMILIES if family not in ("falcon_mamba", "hybrid")]
BOUND = 1e-5  # ratio of norms, float32


def _wide(family: str, **settings: object) -> MambaForCausalLM:
    torch.manual_seed(0)
    return model_of(family, hidden_size=32, **settings)


def _steps(stepper: Stepper, prompt: Tensor) -> Tensor:
    return torch.stack([stepper(column) for column in prompt.unbind(1)], dim=1)


def _by_layers(model: MambaForCausalLM, prompt: Tensor) -> Tensor:
    """Logits of whole sequences, from dequantised weights in torch's own products."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantisedLinear | QuantisedEmbedding):
                setattr(module, name, _plain(child))
    with torch.no_grad():
        return model(prompt, use_cache=False).logits


def _plain(module: QuantisedLinear | QuantisedEmbedding) -> nn.Module:
    weight = _by_definition(module.matrix)
    if isinstance(module, QuantisedEmbedding):
        return nn.Embedding.from_pretrained(weight)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if module.bias is not None:
            plain.bias.copy_(module.bias)
    return plain


def _by_definition(matrix: QuantisedMatrix) -> Tensor:
    """Weight by weight, as the docstring of ops/quantised_linear.py has it."""
    values, scales = matrix
    if scales is None:
        return values.float()
    if values.dtype == torch.int8:
        return values.float() * scales[:, None]
    whole = torch.empty(values.shape[0], matrix.columns)
    for column in range(matrix.columns):
        group, place = divmod(column, 32)
        byte = values[:, group * 16 + place % 16].int()
        whole[:, column] = ((byte >> (4 if place >= 16 else 0)) % 16 - 8) * scales[:, group].float()
    return whole


def _assert_near(got: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= bound, f"{difference:.1e}"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("batch", [1, 3])
def test_native_steps_give_the_logits_of_the_layers(family: str, weights: str, batch: int) -> None:
    model, prompt = quantise(_wide(family), weights), tokens(batch, 6)
    stepper = model.stepper(batch)
    assert stepper.backend == "cpu"
    _assert_near(_steps(stepper, prompt), _by_layers(model, prompt))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_native_greedy_decoding_takes_the_tokens_of_the_layers(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = quantise(_wide("mamba"), weights), tokens(2, 9)

    def decode() -> tuple[str, Tensor]:
        decoder = Decoder(model, 2)
        decoder.read(prompt)
        return decoder.backend, torch.stack(list(decoder.generate(12)), dim=1)

    native, found = decode()
    monkeypatch.setenv("MAMBAKIT_BACKEND", "portable")
    layers, expected = decode()
    assert (native, layers) == ("cpu", "layers")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("family", ["falcon_mamba", "hybrid"])
def test_layers_that_the_native_step_does_not_know_step_themselves(family: str, weights: str) -> None:
    model, prompt = quantise(_wide(family), weights), tokens(2, 6)
    stepper = model.stepper(2)
    assert stepper.backend == "layers"
    _assert_near(_steps(stepper, prompt), _by_layers(model, prompt))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_do_not_depend_on_the_number_of_threads(weights: str) -> None:
    model = quantise(_wide("mamba", vocab_size=100), weights)
    state = model.backbone.initial_state(2)

    def step(threads: int) -> Tensor:
        x, y, logits = torch.tensor([3, 99]), torch.empty(2, 32), torch.empty(2, 100)
        stack = native_stack.build(model.backbone.stack, tree_map(torch.clone, state), torch.empty(2, 32), y)
        stack.set_embedding(native_stack.matrix(model.backbone.embeddings), x)
        stack.set_output(*native_stack.weight_and_bias(model.lm_head), logits)
        stack.step_with(threads)
        return logits

    assert torch.equal(step(1), step(2))
    assert torch.equal(step(1), step(3))


# Products of quantised matrices alone, on every instruction set.


@pytest.fixture(params=cpu.native.instruction_sets() if cpu.AVAILABLE else [])
def instruction_set(request: pytest.FixtureRequest) -> Any:
    before = cpu.native.instruction_set()
    cpu.native.use_instruction_set(request.param)
    yield request.param
    cpu.native.use_instruction_set(before)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (33, 160), (50, 128), (18, 37), (5, 131)])
def test_products_and_rows_are_those_of_the_definition(
    instruction_set: str, format: str, rows: int, columns: int
) -> None:
    columns = -(-columns // 32) * 32 if format == "int4" else columns  # which has whole groups
    matrix = quantise_matrix(torch.randn(rows, columns), format)
    whole = _by_definition(matrix)
    assert torch.equal(matrix.dequantise(), whole)
    for count in (1, 2, 4, 5, 8, 11):
        x = torch.randn(count, columns)
        _assert_near(quantised_linear(x, matrix), x @ whole.T, 2e-6 * columns**0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_take_torchs_product_and_few_the_native_one_with_one_result(format: str) -> None:
    matrix, bias, x = quantise_matrix(torch.randn(40, 64), format), torch.randn(40), torch.randn(2, 50, 64)
    whole = quantised_linear(x, matrix, bias)
    _assert_near(torch.stack([quantised_linear(row, matrix, bias) for row in x.unbind(1)], dim=1), whole)
    assert quantised_linear(x[:, :0], matrix, bias).shape == (2, 0, 40)


def test_a_gradient_reaches_what_a_quantised_matrix_multiplies() -> None:
    matrix, x = quantise_matrix(torch.randn(40, 64), "int8"), torch.randn(3, 64, requires_grad=True)
    quantised_linear(x, matrix).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dequantise().sum(0).expand(3, 64))


# The stepper from tokens to logits.


def test_a_stepper_of_tokens_takes_what_the_layers_left_and_the_other_way_round() -> None:
    model, prompt = quantise(_wide("mamba2"), "int8"), tokens(2, 8)
    expected = _steps(model.stepper(2), prompt)
    stepper = model.stepper(2)
    with torch.no_grad():
        stepper.load(model(prompt[:, :5], use_cache=True).past_key_values.state)
    fork = stepper.fork()
    _assert_near(_steps(stepper, prompt[:, 5:]), expected[:, 5:])
    _assert_near(_steps(fork, prompt[:, 5:]), expected[:, 5:])


def test_edits_and_replacements_of_weights_take_effect_at_the_next_step() -> None:
    model, prompt = _wide("mamba"), tokens(1, 1)
    stepper = model.stepper(1)
    before = stepper(prompt[:, 0])
    with torch.no_grad():
        model.lm_head.weight *= 2
    stepper.reset()
    torch.testing.assert_close(stepper(prompt[:, 0]), 2 * before)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() / 4)
    stepper.reset()
    torch.testing.assert_close(stepper(prompt[:, 0]), before / 2)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    stepper = _wide("mamba").stepper(2)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(IndexError, match=f"below {VOCABULARY}"):
            stepper(torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="x must be 2 tokens"):
        stepper(torch.tensor([0]))
    with pytest.raises(ValueError, match="x must be 2 tokens"):
        stepper(torch.tensor([0.0, 1.0]))


def test_an_embedding_with_a_largest_norm_is_left_to_the_layers() -> None:
    model = _wide("mamba")
    model.backbone.embeddings.max_norm = 1.0
    stepper = model.stepper(1)
    assert stepper.backend == "layers"
    assert "max_norm" in stepper.reason
