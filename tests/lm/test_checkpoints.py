"""Both public formats, both ways, against transformers on the same random weights; and checkpoints that are wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lm.small import FAMILIES, STOCK, model_of, tokens, transformers

from mambakit.errors import ArtefactError, DataError
from mambakit.lm import MambaConfig, MambaForCausalLM, MambaModel

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", STOCK)
def test_logits_of_transformers_own_checkpoint_are_equal(family: str, tmp_path: Path) -> None:
    stock = STOCK[family]()
    stock.save_pretrained(tmp_path)
    ours, prompt = MambaForCausalLM.from_pretrained(tmp_path), tokens(2, 19)
    torch.testing.assert_close(ours(prompt).logits, stock(prompt).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", STOCK)
def test_transformers_reads_what_we_write_without_a_missing_or_unexpected_tensor(
    family: str, tied: bool, tmp_path: Path
) -> None:
    ours, prompt = model_of(family, tie_word_embeddings=tied), tokens(2, 19)
    ours.save_pretrained(tmp_path, format="hf")
    stock, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert stock.config.model_type == family
    torch.testing.assert_close(stock.eval()(prompt).logits, ours(prompt).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", STOCK)
def test_a_stock_config_survives_reading_and_writing(family: str, tmp_path: Path) -> None:
    stock = STOCK[family]()
    stock.save_pretrained(tmp_path / "stock")
    MambaForCausalLM.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "ours"))
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon_mamba"])
@pytest.mark.parametrize(("format", "tied"), [("state-spaces", False), ("state-spaces-bin", True)])
def test_a_model_survives_the_format_of_mamba_ssm(family: str, format: str, tied: bool, tmp_path: Path) -> None:
    ours, prompt = model_of(family, tie_word_embeddings=tied), tokens(2, 9)
    ours.save_pretrained(tmp_path, format=format)
    again = MambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(prompt).logits, ours(prompt).logits)
    assert again.preferred_format == "state-spaces"


def test_the_bin_of_mamba_ssm_has_its_names_and_settings(tmp_path: Path) -> None:
    model_of("hybrid", pad_vocab_size_multiple=8).save_pretrained(tmp_path, format="state-spaces-bin")
    names = set(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.layers.1.mixer.in_proj.weight"} <= names
    assert "backbone.layers.0.mlp.fc1.weight" in names
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["attn_layer_idx"] == [1]
    assert settings["ssm_cfg"] == {"layer": "Mamba2", "d_state": 8, "headdim": 8}
    assert settings["attn_cfg"] == {
        "causal": True,
        "num_heads": 2,
        "rotary_emb_dim": 8,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    }


def test_a_published_mamba_config_is_read_with_the_defaults_that_it_leaves_out(tmp_path: Path) -> None:
    # The config.json of state-spaces/mamba-130m, smaller: no attention, no layer, no tie_embeddings.
    small = MambaForCausalLM(MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1))
    small.save_pretrained(tmp_path, format="state-spaces-bin")
    settings = {"d_model": 16, "n_layer": 1, "vocab_size": 43, "ssm_cfg": {}, "rms_norm": True}
    settings |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert MambaForCausalLM.from_pretrained(tmp_path).config.vocab_size == 48


@pytest.mark.parametrize("format", ["hf", "state-spaces"])
def test_the_settings_alone_are_read_from_either_format(format: str, tmp_path: Path) -> None:
    model_of("mamba2").save_pretrained(tmp_path, format=format)
    config = MambaConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.mixer, config.options_of("mamba2")["headdim"]) == (16, "mamba2", 8)


def test_a_base_model_and_half_precision_are_read(tmp_path: Path) -> None:
    model = model_of("mamba")
    model.save_pretrained(tmp_path)
    base = MambaModel.from_pretrained(tmp_path)
    prompt = tokens(1, 5)
    torch.testing.assert_close(base(prompt).last_hidden_state, model.backbone(prompt).last_hidden_state)
    half = MambaForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32, "rates stay in float32"
    half.save_pretrained(tmp_path / "half")
    assert MambaForCausalLM.from_pretrained(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mamba3", "hybrid"])
def test_what_transformers_has_no_class_for_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="choose the format state-spaces"):
        model_of(family).save_pretrained(tmp_path, format="hf")
    assert not list(tmp_path.iterdir())


def _changed(tmp_path: Path, change: object) -> None:
    model_of("mamba").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)  # type: ignore[operator]
    save_file(weights, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("backbone.layers.1.mixer.D"), "backbone.layers.1.mixer.D is missing"),
        (
            lambda w: w.update({"backbone.norm_f.weight": torch.ones(3)}),
            r"norm_f.weight has shape \(3,\), expected \(16",
        ),
        (lambda w: w.update({"other": torch.ones(3)}), "other is not a tensor of this model"),
    ],
)
def test_a_wrong_checkpoint_names_the_tensor(change: object, words: str, tmp_path: Path) -> None:
    _changed(tmp_path, change)
    with pytest.raises(ArtefactError, match=words):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file_names_the_first_tensor_that_it_lost(tmp_path: Path) -> None:
    model_of("mamba").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match=r"truncated.*\(lm_head.weight is missing"):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_bin_is_an_error_of_one_line(tmp_path: Path) -> None:
    model_of("mamba").save_pretrained(tmp_path, format="state-spaces-bin")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(ArtefactError, match=r"pytorch_model\.bin: it is truncated or damaged") as caught:
        MambaForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bin_that_would_run_code_is_refused(tmp_path: Path) -> None:
    model_of("mamba").save_pretrained(tmp_path, format="state-spaces-bin")
    torch.save({"lm_head.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="cannot read"):
        MambaForCausalLM.from_pretrained(tmp_path)


def test_a_foreign_config_and_a_missing_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArtefactError, match="model_type 'llama'"):
        MambaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="not a folder with a model"):
        MambaForCausalLM.from_pretrained(tmp_path / "absent")


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model, prompt = model_of("mamba"), tokens(1, 5)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{position % 2}.safetensors" for position, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(MambaForCausalLM.from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("format", ["hf", "state-spaces-bin"])
def test_a_repository_on_the_hub_is_downloaded_without_weights_that_are_there_twice(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt, asked = model_of("mamba"), tokens(1, 5), []
    model.save_pretrained(tmp_path, format=format)

    def download(name: str, *, allow_patterns: list[str], revision: str | None, **_: object) -> str:
        asked.append((name, revision, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = MambaForCausalLM.from_pretrained("someone/mamba", revision="main")
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    first = ("someone/mamba", "main", False)
    assert asked == ([first] if format == "hf" else [first, ("someone/mamba", "main", True)])


def test_a_repository_that_can_not_be_had_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="neither a folder here nor a repository") as caught:
        MambaForCausalLM.from_pretrained("someone/absent", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(DataError, match="state_size is no setting"):
        MambaConfig(state_size=8)
    with pytest.raises(DataError, match="mixer must be one of"):
        MambaConfig(mixer="lstm")
    with pytest.raises(DataError, match="mixer_options do not fit"):
        MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, mixer_options={"heads": 3}))
