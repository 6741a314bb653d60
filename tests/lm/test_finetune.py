"""Adapters by PEFT, trained by TRL: the seed's example, every target, merging, packing."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from click.testing import Result
from tests.lm.small import model_of, tokens
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.errors import ArtefactError, DataError
from mambakit.lm import MambaForCausalLM, byte_tokenizer

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TARGETS = ["x_proj", "embeddings", "in_proj", "out_proj"]
QUOTES = ["Be yourself; everyone else is already taken.", "So many books, so little time.", "A room without books."]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with a small model, tied as the published ones are, and a tokenizer of bytes."""
    folder = tmp_path / "model"
    model_of("mamba", vocab_size=264, tie_word_embeddings=True, eos_token_id=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _trainer(model: MambaForCausalLM, folder: Path, dataset: object, **settings: object) -> object:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=2e-3,
        dataset_text_field="quote",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **settings,
    )
    lora = peft.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM", bias="none")
    return trl.SFTTrainer(
        model=model,
        processing_class=byte_tokenizer(),
        args=arguments,
        peft_config=lora,
        train_dataset=dataset,
    )


@pytest.mark.parametrize("settings", [{}, {"bf16": False}, {"packing": True, "max_length": 64, "bf16": False}])
def test_the_seed_s_example_trains_every_adapter(settings: dict, stored: Path, tmp_path: Path) -> None:
    model = MambaForCausalLM.from_pretrained(stored)
    trainer = _trainer(model, tmp_path / "run", datasets.Dataset.from_dict({"quote": QUOTES * 8}), **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    # B starts at zero, but for an embedding, whose A does.
    moved = {name: float(p.detach().abs().max()) for name, p in trainer.model.named_parameters() if "lora_B" in name}
    moved |= {
        name: float(p.detach().abs().max()) for name, p in trainer.model.named_parameters() if "embedding_A" in name
    }
    assert len(moved) == 2 * 3 + 1
    assert all(size > 0 for size in moved.values()), moved


@pytest.mark.parametrize("target", [*TARGETS, "dt_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_adapter_changes_the_output_alone_and_merged(target: str, tied: bool) -> None:
    model, prompt = model_of("mamba", vocab_size=264, tie_word_embeddings=tied), tokens(2, 7)
    base = model(prompt).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM")).eval()
    assert torch.equal(adapted(prompt).logits, base), "an untrained adapter changes nothing"
    layers = [name for name, _ in adapted.named_parameters() if "lora" in name and ("_B" in name or "_A" in name)]
    for name, parameter in adapted.named_parameters():
        if name in layers:
            torch.nn.init.normal_(parameter)
    changed = adapted(prompt).logits
    assert (changed - base).abs().max() > 1e-5
    # Each layer's adapter counts.
    for index in range(2 if target != "embeddings" else 0):
        for name, parameter in adapted.named_parameters():
            if f"layers.{index}." in name and "lora_B" in name:
                kept = parameter.detach().clone()
                parameter.data.zero_()
                assert not torch.equal(adapted(prompt).logits, changed), name
                parameter.data.copy_(kept)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, MambaForCausalLM)
    torch.testing.assert_close(merged(prompt).logits, changed, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_adapter_through_the_state(stored: Path) -> None:
    model = MambaForCausalLM.from_pretrained(stored)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompt = tokens(2, 9)
    adapted(prompt, labels=prompt).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * (2 * 3 + 1)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_a_merged_model_is_stored_untied_and_read_again(stored: Path, tmp_path: Path) -> None:
    model, prompt = MambaForCausalLM.from_pretrained(stored), tokens(1, 7)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["embeddings"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.eval().named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    expected = adapted(prompt).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = MambaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(prompt).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_the_convolution_is_refused(stored: Path) -> None:
    model = MambaForCausalLM.from_pretrained(stored)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=32, target_modules=["conv1d", "in_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(DataError, match="leave conv1d out"):
        adapted(tokens(1, 3))


def test_packed_examples_train_as_they_do_alone(stored: Path, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"quote": QUOTES})
    gradients = []
    for packing in (False, True):
        model = MambaForCausalLM.from_pretrained(stored)
        trainer = _trainer(model, tmp_path / str(packing), data, packing=packing, max_length=256, bf16=False)
        batch = next(iter(trainer.get_train_dataloader()))
        assert len(batch["input_ids"]) == (1 if packing else 3)
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        gradients.append([p.grad for p in trainer.model.parameters() if p.requires_grad])
    for alone, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-3)


def _finetune(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lm", "finetune", "--quiet", *map(str, arguments)])


def test_the_command_trains_on_jsonl_and_stores_adapters_or_a_merged_model(stored: Path, tmp_path: Path) -> None:
    from mambakit.lm.finetune import load_adapted

    data = tmp_path / "quotes.jsonl"
    data.write_text("".join(json.dumps({"quote": quote}) + "\n" for quote in QUOTES * 4))
    outs = {}
    for name, extra in {"adapters": [], "merged": ["--merge"]}.items():
        done = _finetune("--model", stored, "--data", data, "--field", "quote", "--out", tmp_path / name, *extra)
        assert done.exit_code == 0, done.output
        outs[name] = done.stdout.splitlines()
    words = outs["merged"][0].replace(",", "").split()
    assert words[1:4] == ["parameters", "trained", "loss"], "nothing but this, since it is quiet"
    assert float(words[-3]) < float(words[4])
    assert outs["adapters"][-1] == f"stored as {tmp_path / 'adapters'}"
    merged, prompt = MambaForCausalLM.from_pretrained(tmp_path / "merged"), tokens(1, 6)
    torch.testing.assert_close(
        load_adapted(tmp_path / "adapters")(prompt).logits, merged(prompt).logits, atol=1e-4, rtol=1e-4
    )
    options = ["--max-new-tokens", "9", "--temperature", "0", "--quiet", "--tokenizer", str(stored)]
    texts = [
        CliRunner().invoke(app, ["lm", "generate", "Be", "--model", str(tmp_path / name), *options]).stdout
        for name in ("adapters", "merged")
    ]
    assert texts[0] == texts[1] != ""


def test_parquet_and_text_are_read_too(tmp_path: Path) -> None:
    from mambakit.lm.finetune import read_examples

    parquet.write_table(pa.table({"quote": QUOTES}), tmp_path / "q.parquet")
    (tmp_path / "q.txt").write_text("\n".join(QUOTES) + "\n\n")
    assert read_examples(tmp_path / "q.parquet", "quote")["quote"] == QUOTES
    assert read_examples(tmp_path / "q.txt", "text")["text"] == QUOTES


def test_what_can_be_mended_is_said(stored: Path, tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text('{"quote": "a"}\n{"other": 3}\n')
    asked = ["--model", stored, "--data", data, "--out", tmp_path / "out", "--field", "quote"]
    wrong = _finetune(*asked).exception
    assert isinstance(wrong, DataError)
    assert "line 2: no text in the field quote; found other" in str(wrong)
    data.write_text('{"quote": "a"}\n')
    assert "no module q_proj" in str(_finetune(*asked, "--targets", "q_proj").exception)
    assert "conv1d would have no effect" in str(_finetune(*asked, "--targets", "conv1d").exception)
    (tmp_path / "out").mkdir()
    assert isinstance(_finetune(*asked).exception, ArtefactError)
