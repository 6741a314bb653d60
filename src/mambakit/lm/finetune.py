"""Fine-tuning of a stored model by low-rank adapters, with PEFT and TRL's SFTTrainer.

Every projection is called as a module, so an adapter on any of in_proj, x_proj, dt_proj, out_proj and embeddings takes
part, in training and merged. Packed examples are kept apart.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambakit.errors import ArtefactError, DataError
from mambakit.lm.checkpoint import Source
from mambakit.lm.data import read_documents
from mambakit.lm.model import MambaForCausalLM
from mambakit.lm.tokenizers import load_tokenizer
from mambakit.training.artefacts import read_json, write_folder, write_json

if TYPE_CHECKING:
    from datasets import Dataset

_LOGGED = 10  # how often a run shows its loss
TARGETS = ("x_proj", "embeddings", "in_proj", "out_proj")


@dataclass(frozen=True)
class FinetuneSettings:
    """How adapters are trained.

    Args:
        epochs: passes over the examples.
        batch_size: examples, or packs of them, behind one step.
        learning_rate: highest learning rate.
        rank: of the adapters.
        targets: the modules that get one.
        max_length: tokens of an example, or of a pack; longer examples are cut.
        packing: whether several examples share a row.
        seed: fixes all randomness.
    """

    epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-3
    rank: int = 8
    targets: tuple[str, ...] = TARGETS
    max_length: int = 1024
    packing: bool = False
    seed: int = 0


def read_examples(file: Path, field: str) -> "Dataset":
    """A JSONL, Parquet or text file (an example a line) as a dataset with the one column `field`.

    Raises DataError for a file that is missing, damaged, or has no such field.
    """
    from datasets import Dataset

    if not file.is_file():
        raise DataError(f"{file} is not there: expected a JSONL, Parquet or text file")
    if file.suffix == ".parquet":
        texts = ["".join(document) for document in read_documents([file], field)]
    elif file.suffix in (".jsonl", ".json"):
        texts = [_text_of(line, number, file, field) for number, line in enumerate(_lines(file), 1) if line.strip()]
    else:
        texts = [line for line in _lines(file) if line.strip()]
    if not texts:
        raise DataError(f"{file} holds no example")
    return Dataset.from_dict({field: texts})


def finetune(
    source: str,
    examples: "Dataset",
    field: str,
    out: Path,
    settings: FinetuneSettings,
    *,
    tokenizer: str | None = None,
    merge: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Train adapters of a stored model and store them, or the merged model, with the tokenizer, as the folder `out`.

    Args:
        source: a folder, or a repository on the hub.
        field: the column of the examples.
        tokenizer: where the tokenizer is, if not with the model.
        merge: whether to store the merged model.

    Returns the first and the last training loss, and how many parameters were trained. Raises DataError for targets
    that the model does not have, ArtefactError where `out` is there already.
    """
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    if out.exists():
        raise ArtefactError(f"{out} is there already; remove it, or choose another folder with --out")
    model, words = MambaForCausalLM.from_pretrained(source), load_tokenizer(Source(tokenizer or source).folder())
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := [target for target in settings.targets if target not in names]:
        known = sorted(names & {"in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "fc1", "fc2"})
        raise DataError(f"the model has no module {missing[0]} to adapt: expected some of {', '.join(known)}")
    if "conv1d" in settings.targets:
        raise DataError("an adapter on conv1d would have no effect: leave it out")
    steps = settings.epochs * -(-len(examples) // settings.batch_size)
    with tempfile.TemporaryDirectory(prefix="mambakit-finetune-") as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            dataset_text_field=field,
            max_length=settings.max_length,
            packing=settings.packing,
            seed=settings.seed,
            bf16=False,  # half precision is no faster on most CPUs, and steps are small numbers
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=max(1, steps // _LOGGED),
            logging_first_step=True,
            report_to=[],
            disable_tqdm=quiet,
        )
        adapters = LoraConfig(
            r=settings.rank, target_modules=list(settings.targets), task_type="CAUSAL_LM", bias="none"
        )
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=examples, processing_class=words, peft_config=adapters
        )
        if quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapted: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    summary = {"first_loss": losses[0], "last_loss": losses[-1], "parameters": float(trained)}
    adapted.eval()
    final = adapted.merge_and_unload() if merge else adapted

    def fill(temporary: Path) -> None:
        final.save_pretrained(temporary)
        words.save_pretrained(temporary)
        write_json(temporary / "finetuning.json", {"model": source, **summary})

    if trainer.is_world_process_zero():
        write_folder(out, fill)
    return summary


def load_adapted(folder: str | Path, base: str | None = None, dtype: str | None = None) -> MambaForCausalLM:
    """A model with the adapters of `folder` merged into it.

    Args:
        base: the model that they are of; None: the one that they were trained on.
        dtype: of the weights; None or "auto" keeps those of the base.

    Raises ArtefactError where either is missing.
    """
    from peft import PeftModel

    settings = read_json(Path(folder) / "adapter_config.json")
    model = MambaForCausalLM.from_pretrained(base or settings["base_model_name_or_path"], dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()


def parse_targets(names: Sequence[str] | str) -> tuple[str, ...]:
    """Names of modules from a list, or separated by commas; raises DataError for none."""
    parts = names.split(",") if isinstance(names, str) else names
    found = tuple(name.strip() for name in parts if name.strip())
    if not found:
        raise DataError("targets must name at least one module to adapt, such as in_proj,out_proj")
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}: convert it first") from error


def _text_of(line: str, number: int, file: Path, field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number}: not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{file}, line {number}: no text in the field {field}; found {found}")
    return row[field]
