"""The files of llama.cpp: what is in them, read back by its authors' package, and what llama.cpp computes from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.lm.llama import logits_of_llama, tokens_of_llama
from tests.lm.small import model_of
from torch import Tensor

from mambakit.errors import ArtefactError, DataError
from mambakit.lm import MambaForCausalLM, byte_tokenizer, train_tokenizer
from mambakit.lm.gguf_file import write_gguf
from mambakit.lm.gguf_vocabulary import Vocabulary, vocabulary_of

gguf = pytest.importorskip("gguf")

TEXT = "The quick brown fox's 3 cubs, it's said, jump over 12 lazy dogs.\n\n  Naïve café → 東京! "
FAMILIES = {
    "mamba": {"mixer": "mamba", "mixer_options": {"d_state": 4}},
    "falcon_mamba": {"mixer": "mamba", "mixer_options": {"d_state": 4, "b_c_dt_rms_eps": 1e-5}},
    "mamba2": {"mixer": "mamba2", "mixer_options": {"d_state": 8, "headdim": 16, "n_groups": 2}},
}


def wide_model(family: str, **settings: object) -> MambaForCausalLM:
    """Rows of whole blocks of Q8_0, unlike those of the smallest models."""
    return model_of(family, hidden_size=64, **{**FAMILIES[family], **settings})


def read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Metadata and, widened to float32, tensors."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors


def expected_of_mamba(model: MambaForCausalLM) -> dict[str, Tensor]:
    expected = {
        "token_embd.weight": model.backbone.embeddings.weight,
        "output.weight": model.lm_head.weight,
        "output_norm.weight": model.backbone.norm_f.weight,
    }
    for i, layer in enumerate(model.backbone.layers):
        m = layer.mixer
        own = {
            "attn_norm.weight": layer.norm.weight,
            "ssm_in.weight": m.in_proj.weight,
            "ssm_conv1d.weight": m.conv1d.weight[:, 0],
            "ssm_conv1d.bias": m.conv1d.bias,
            "ssm_out.weight": m.out_proj.weight,
            "ssm_a": -m.A_log.exp(),
            "ssm_d": m.D,
        }
        if hasattr(m, "x_proj"):
            own |= {"ssm_x.weight": m.x_proj.weight}
            own |= {"ssm_dt.weight": m.dt_proj.weight, "ssm_dt.bias": m.dt_proj.bias}
        else:
            own |= {"ssm_a": -m.A_log.exp()[:, None], "ssm_d": m.D[:, None], "ssm_dt.bias": m.dt_bias}
            own["ssm_norm.weight"] = m.norm.weight.unflatten(0, (m.n_groups, -1))
        expected |= {f"blk.{i}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.detach() for name, tensor in expected.items()}


# What half precision and blocks of bytes lose of a weight, as a share of the largest of its block.
LOSS = {"f32": 0.0, "f16": 2**-11, "q8_0": 1 / 254 + 2**-11}


@pytest.mark.parametrize("type", LOSS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_in_the_file(family: str, type: str, tmp_path: Path) -> None:
    model = wide_model(family)
    write_gguf(tmp_path / "model.gguf", model, type)
    _, found = read(tmp_path / "model.gguf")
    expected = expected_of_mamba(model)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        bound = LOSS[type] * float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, atol=bound, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )


def test_matrices_are_small_and_what_llama_wants_wide_is_wide(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", wide_model("mamba"), "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ssm_in.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ssm_dt.weight"] == "F16", "its rows of 4 are no blocks of 32"
    for name in ("ssm_conv1d.weight", "ssm_a", "ssm_d", "attn_norm.weight", "ssm_dt.bias"):
        assert kinds[f"blk.1.{name}"] == "F32", name


def test_the_settings_are_in_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", wide_model("mamba", tie_word_embeddings=True))
    fields, tensors = read(tmp_path / "one.gguf")
    sizes = {"conv_kernel": 4, "inner_size": 128, "state_size": 4, "time_step_rank": 4, "dt_b_c_rms": False}
    assert {name: fields[f"mamba.ssm.{name}"] for name in sizes} == sizes
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert "output.weight" not in tensors, "a tied head is the embedding"
    write_gguf(tmp_path / "two.gguf", wide_model("mamba2"))
    fields, _ = read(tmp_path / "two.gguf")
    sizes = {"inner_size": 128, "state_size": 8, "time_step_rank": 8, "group_count": 2}
    assert {name: fields[f"mamba2.ssm.{name}"] for name in sizes} == sizes
    assert fields["mamba2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize(("type", "tolerance"), [("f32", 1e-3), ("f16", 0.02), ("q8_0", 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_computes_what_we_compute(family: str, type: str, tolerance: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, prompt = wide_model(family), torch.randint(40, (1, 19))
    write_gguf(tmp_path / "model.gguf", model, type)
    theirs = logits_of_llama(tmp_path / "model.gguf", prompt[0].tolist())
    with torch.no_grad():
        ours = model(prompt).logits[0]
    assert float(ours.std()) > 0.5
    torch.testing.assert_close(theirs, ours, atol=tolerance * float(ours.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_llama_cuts_a_text_into_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else train_tokenizer([TEXT * 20], 300, quiet=True)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = vocabulary_of(tmp_path, 304)
    assert isinstance(vocabulary, Vocabulary)
    write_gguf(tmp_path / "model.gguf", wide_model("mamba", vocab_size=304), "f32", vocabulary)
    fields, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = np.asarray(fields["tokenizer.ggml.token_type"])
    assert kinds[tokenizer.eos_token_id] == 3
    assert (kinds[len(tokenizer) :] == 5).all()
    ids = tokenizer(TEXT)["input_ids"]
    assert tokens_of_llama(tmp_path / "model.gguf", TEXT) == ids
    assert len(ids) < len(TEXT.encode()) or kind == "bytes"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole["model"].update(type="Unigram"), "Unigram"),
        (lambda whole: whole["pre_tokenizer"].update(type="Metaspace"), "splits texts"),
        (lambda whole: whole.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda whole: whole["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "x"}}), "adds tokens"),
    ],
)
def test_a_tokenizer_that_llama_has_no_equal_of_is_left_out_with_the_reason(change, reason, tmp_path: Path) -> None:
    train_tokenizer([TEXT * 20], 300, quiet=True).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    found = vocabulary_of(tmp_path, 304)
    assert isinstance(found, str)
    assert reason in found


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="the model knows 256"):
        vocabulary_of(tmp_path, 256)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mixer": "mamba3", "mixer_options": {"d_state": 8, "headdim": 16}}, "mamba3"),
        ({"mixer": "mamba", "mixer_options": {"expand": 3}}, "d_inner of 192"),
        ({"mixer": "mamba", "mixer_options": {"bias": True}}, "biases"),
        ({"mixer": "mamba2", "mixer_options": {"headdim": 16, "norm_before_gate": True}}, "norm_before_gate"),
        ({"mixer": "mamba2", "mixer_options": {"headdim": 16, "dt_limit": (0.0, 1.0)}}, "dt_limit"),
        ({"mixer": "mamba", "mixer_options": {}, "mlp_size": 128}, "an MLP"),
    ],
)
def test_a_model_that_llama_has_no_equal_of_is_refused(settings: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=reason):
        write_gguf(tmp_path / "model.gguf", model_of("mamba", hidden_size=64, **settings))
    assert not list(tmp_path.iterdir())


def test_a_weight_that_the_type_cannot_hold_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    model = wide_model("mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight[0, 0] = 1e6
    with pytest.raises(ArtefactError, match=r"blk\.1\.ssm_out\.weight"):
        write_gguf(tmp_path / "model.gguf", model, "f16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="f32, f16, q8_0"):
        write_gguf(tmp_path / "model.gguf", model, "q4_k")


def test_a_missing_bias_of_the_convolution_is_zero_there(tmp_path: Path) -> None:
    model = wide_model("mamba", mixer_options={"d_state": 4, "conv_bias": False})
    write_gguf(tmp_path / "model.gguf", model)
    assert not read(tmp_path / "model.gguf")[1]["blk.0.ssm_conv1d.bias"].any()
