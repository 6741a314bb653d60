"""Quantised models beside the models that they were, and beside their own dequantised weights."""

import copy
from pathlib import Path

import pytest
import torch
from tests.lm.small import FAMILIES, model_of, tokens

from mambakit.errors import DataError
from mambakit.lm import Decoder, MambaForCausalLM, quantise
from mambakit.lm.quantisation import PROJECTIONS, weight_bytes
from mambakit.nn import QuantisedEmbedding, QuantisedLinear
from mambakit.ops.quantised_linear import FORMATS, quantise_matrix

# Root of the mean square of what rounding changes, as a share of a normal weight's: 2^-9 / sqrt(3) is bfloat16's mean.
ERROR = {"bfloat16": 0.002, "int8": 0.01, "int4": 0.09}


def _wide(family: str, **settings: object) -> MambaForCausalLM:
    torch.manual_seed(0)
    return model_of(family, hidden_size=32, **settings)


def _dequantised(model: MambaForCausalLM) -> MambaForCausalLM:
    """A plain model in float32 with the weights that a quantised one stands for."""
    plain = MambaForCausalLM(copy.deepcopy(model.config)).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear | QuantisedEmbedding):
            weights[f"{name}.weight"] = module.matrix.dequantise()
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_matrix_is_near_the_matrix(format: str) -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    found = quantise_matrix(weight, format).dequantise()
    assert found.shape == weight.shape
    assert (found - weight).norm() < ERROR[format] * weight.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros_and_single_weights_are_kept(format: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = -1.5
    torch.testing.assert_close(quantise_matrix(weight, format).dequantise(), weight, atol=0, rtol=0.005)


def test_int8_rounds_each_weight_to_the_nearest_step_of_its_row() -> None:
    weight = torch.randn(5, 33)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantise_matrix(weight, "int8").dequantise() - weight).abs() <= step * 0.5001).all()


def test_int4_is_nearer_than_its_largest_scale_would_be() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    furthest = weight.gather(1, weight.abs().argmax(1, keepdim=True)) / -8
    plain = (weight / furthest).round().clamp(-8, 7) * furthest
    assert (quantise_matrix(weight, "int4").dequantise() - weight).norm() < 0.98 * (plain - weight).norm()


def test_rows_of_a_quantised_matrix_are_rows_of_what_it_stands_for() -> None:
    matrix, indices = quantise_matrix(torch.randn(9, 64), "int4"), torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(matrix.rows(indices), matrix.dequantise()[indices])


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_computes_with_its_dequantised_weights(family: str, weights: str) -> None:
    model, prompt = quantise(_wide(family), weights), tokens(2, 7)
    expected = _dequantised(model)(prompt).logits
    torch.testing.assert_close(model(prompt).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("weights", "share"), [("bfloat16", 0.02), ("int8", 0.05), ("int4", 0.5)])
def test_a_quantised_model_says_nearly_what_the_model_said(weights: str, share: float) -> None:
    model, prompt = _wide("mamba"), tokens(2, 7)
    before = model(prompt).logits
    changed = (quantise(model, weights)(prompt).logits - before).norm() / before.norm()
    assert 0 < changed < share


def test_big_matrices_alone_are_quantised() -> None:
    model = quantise(_wide("hybrid"), "int8")
    kinds = {name: type(module) for name, module in model.named_modules()}
    found = {name.split(".")[-1] for name, kind in kinds.items() if kind in (QuantisedLinear, QuantisedEmbedding)}
    assert (
        found
        == {"embeddings", "lm_head", "in_proj", "out_proj", "fc1", "fc2"}
        <= {
            "embeddings",
            "lm_head",
            *PROJECTIONS,
        }
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_tied_head_stays_tied() -> None:
    model = quantise(_wide("mamba", tie_word_embeddings=True), "int8")
    assert model.lm_head.values.data_ptr() == model.backbone.embeddings.values.data_ptr()


@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", 16), ("int8", 8), ("int4", 4.5)])
def test_weights_take_the_bytes_that_their_bits_promise(weights: str, bits: float) -> None:
    model = model_of("mamba", hidden_size=64, vocab_size=2000)
    quantised = {id(module.weight): module.weight.numel() for module in _big(model)}
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(quantised.values())
    expected = sum(quantised.values()) * bits / 8 + 4 * others
    assert weight_bytes(quantise(model, weights)) == pytest.approx(expected, rel=0.07)


def _big(model: MambaForCausalLM) -> list:
    return [m for name, m in model.named_modules() if name.split(".")[-1] in ("embeddings", "lm_head", *PROJECTIONS)]


def test_casts_leave_quantised_weights_and_scales_as_they_are() -> None:
    model = quantise(_wide("mamba"), "int8")
    before = model.lm_head.scales.clone()
    model.to(torch.bfloat16)
    assert model.lm_head.values.dtype == torch.int8
    assert torch.equal(model.lm_head.scales, before)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_reading_in_fewer_bits_is_reading_and_quantising(tmp_path: Path, weights: str) -> None:
    model = _wide("mamba", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    read, prompt = MambaForCausalLM.from_pretrained(tmp_path, weights=weights), tokens(1, 5)
    assert read.quantised == weights
    torch.testing.assert_close(read(prompt).logits, quantise(model, weights)(prompt).logits)


def test_what_is_not_quantised_does_not_keep_the_file_in_memory(tmp_path: Path) -> None:
    _wide("mamba").save_pretrained(tmp_path)
    model = MambaForCausalLM.from_pretrained(tmp_path, weights="int8")
    assert all(tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes for tensor in model.state_dict().values())


def test_float32_is_a_name_too() -> None:
    model = _wide("mamba").to(torch.bfloat16)
    assert quantise(model, "float32").lm_head.weight.dtype == torch.float32
    assert model.quantised is None


def test_generation_by_transformers_and_by_the_decoder_agree() -> None:
    model, prompt = quantise(_wide("mamba2"), "int8"), tokens(2, 6)
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    decoder = Decoder(model, 2)
    decoder.read(prompt)
    assert torch.equal(torch.stack(list(decoder.generate(6)), dim=1), theirs[:, 6:])


def test_training_and_saving_are_refused(tmp_path: Path) -> None:
    model = quantise(_wide("mamba"), "int8")
    with pytest.raises(DataError, match="int8 can't be trained"):
        model.train()
    with pytest.raises(DataError, match="no public format holds weights in int8"):
        model.save_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_quantised_is_named() -> None:
    with pytest.raises(DataError, match="weights must be one of float32, bfloat16, int8, int4, got 'int3'"):
        quantise(_wide("mamba"), "int3")
    with pytest.raises(DataError, match=r"int4 needs a multiple of 32 columns, but .*has 16"):
        quantise(model_of("mamba"), "int4")
    with pytest.raises(DataError, match="in int8 already"):
        quantise(quantise(_wide("mamba"), "int8"), "bfloat16")


def test_a_model_with_adapters_is_refused_until_they_are_merged() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(_wide("mamba"), peft.LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    with pytest.raises(DataError, match="in_proj is no plain layer and can't be quantised: merge adapters first"):
        quantise(adapted.base_model.model, "int8")


def test_dtype_and_weights_exclude_each_other(tmp_path: Path) -> None:
    _wide("mamba").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="give dtype or weights"):
        MambaForCausalLM.from_pretrained(tmp_path, weights="int8", dtype="bfloat16")
