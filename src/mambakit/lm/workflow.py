"""What the commands do, end to end: train and store a model, evaluate and convert stored ones."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambakit.errors import ArtefactError, DataError, TrainingDiverged
from mambakit.lm.checkpoint import FORMATS, Source, default_format
from mambakit.lm.config import MambaConfig
from mambakit.lm.data import TokenStream, read_documents, texts_of, tokenize
from mambakit.lm.evaluate import Evaluation, evaluate
from mambakit.lm.model import MambaForCausalLM
from mambakit.lm.quantisation import quantise
from mambakit.lm.tokenizers import byte_tokenizer, load_tokenizer, tokenizer_from_json, train_tokenizer
from mambakit.lm.train import train, untrained
from mambakit.training import TrainingConfig, TrainingRecord
from mambakit.training.artefacts import exclusive, remove_folder, write_folder, write_json
from mambakit.training.processes import decided_by_first, held_by_first, is_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PADDED_TO = 8  # rows of the embedding, for the matrix products' sake
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "chat_template*")


@dataclass(frozen=True)
class Texts:
    """What a model is trained on.

    Attributes:
        files: text or Parquet.
        validation: further files to judge by; none: the last `validation_share` of the tokens.
        column: of Parquet files.
        tokenizer: "bytes", a number of tokens to train one of, or a folder that has one.
    """

    files: Sequence[Path]
    validation: Sequence[Path] = ()
    validation_share: float = 0.1
    column: str = "text"
    tokenizer: str = "bytes"


@dataclass(frozen=True)
class Trained:
    """What training gave."""

    record: TrainingRecord
    held_out: Evaluation
    parameters: int


def train_and_store(
    texts: Texts,
    out: Path,
    settings: Callable[[int], MambaConfig],
    training: TrainingConfig,
    *,
    context: int,
    minutes: float | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Trained | None:
    """Train a model on texts and store it, with its tokenizer, as the folder `out`, as transformers reads it.

    Checkpoints go to the folder `out`.run beside it, which goes when the model is stored; with `resume` a killed
    training goes on from there. Under `accelerate launch` all processes call this, and the first returns what it gave.

    Args:
        settings: the model's, given the rows that its embedding needs.

    Raises DataError for files that can't be used, ArtefactError where `out` is there already or can't be written.
    """
    run_dir = Path(f"{out}.run")
    if decided_by_first(lambda: out.exists()):
        raise ArtefactError(f"{out} is there already; remove it, or choose another folder with --out")
    tokenizer = _tokenizer(texts, quiet)
    stream = tokenize(read_documents(texts.files, texts.column), tokenizer)
    if texts.validation:
        learnt, held_out = stream, tokenize(read_documents(texts.validation, texts.column), tokenizer)
    else:
        learnt, held_out = stream.split(texts.validation_share)
    config = settings(-(-len(tokenizer) // _PADDED_TO) * _PADDED_TO)
    default_format(config)  # what can't be stored is better not trained
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = untrained(config, training.seed)
    with held_by_first(lambda: exclusive(run_dir)):
        try:
            record = train(
                *(model, learnt, held_out, training),
                context=context,
                minutes=minutes,
                run_dir=run_dir,
                resume=resume,
                quiet=quiet,
            )
        except TrainingDiverged:
            if is_first():
                remove_folder(run_dir)  # resuming would only diverge again
            raise
        if not is_first():
            return None
        bound = context if "attention" in config.mixers else None
        found = evaluate(model.float(), held_out, text_bytes(held_out, tokenizer), context=bound)
        trained = Trained(record, found, sum(parameter.numel() for parameter in model.parameters()))
        _store(out, model, tokenizer, trained, texts)
        with suppress(OSError):
            remove_folder(run_dir)
    return trained


def open_model(
    name: str, tokenizer: str | None = None, dtype: str | None = None, weights: str | None = None
) -> "tuple[MambaForCausalLM, PreTrainedTokenizerFast]":
    """A stored model, or one with stored adapters merged into it, and its tokenizer.

    Args:
        name: a folder, or a repository on the hub.
        tokenizer: where the tokenizer is, if it is elsewhere.
        dtype: of the weights; None or "auto" keeps theirs.
        weights: what to store them in, see `mambakit.lm.quantise`; None leaves them.

    Raises DataError for another name, ArtefactError where either is missing.
    """
    if (Path(name) / "adapter_config.json").is_file():
        from mambakit.lm.finetune import load_adapted

        model = load_adapted(name, dtype=dtype)
        model = model if weights is None else quantise(model, weights)
    else:
        model = MambaForCausalLM.from_pretrained(name, dtype=dtype, weights=weights)
    return model, load_tokenizer(Source(tokenizer or name).folder())


def evaluate_stored(
    model: MambaForCausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    files: Sequence[Path],
    *,
    column: str = "text",
    last: float = 1.0,
    context: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate on text or Parquet files, or on their last share alone; `context` as in `evaluate`."""
    stream = tokenize(read_documents(files, column), tokenizer)
    if last < 1:
        _, stream = stream.split(last)
    return evaluate(model, stream, text_bytes(stream, tokenizer), context=context, on_tokens=on_tokens)


def convert(source: str, out: Path, format: str, dtype: str | None = None) -> None:
    """Write a model in another format, its tokenizer beside it.

    Raises ArtefactError for a model that the format can't hold, and where `out` is there already.
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if out.exists():
        raise ArtefactError(f"{out} is there already; remove it, or choose another folder")
    model = MambaForCausalLM.from_pretrained(source, dtype=dtype)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder, format=format)
        copy_tokenizer(Source(source).folder(), folder)

    write_folder(out, fill)


def convert_to_gguf(source: str, out: Path, type: str) -> list[str]:
    """Write a model, with its tokenizer where llama.cpp has an equal of it, as the file `out`.

    Returns what llama.cpp will do otherwise than this model, a sentence each.

    Raises ArtefactError for a model that llama.cpp has no equal of, and where `out` is there already.
    """
    from mambakit.lm.formats import gguf
    from mambakit.lm.gguf_file import write_gguf
    from mambakit.lm.gguf_vocabulary import Vocabulary, vocabulary_of

    if out.exists():
        raise ArtefactError(f"{out} is there already; remove it, or choose another name")
    model = MambaForCausalLM.from_pretrained(source)
    found = vocabulary_of(Source(source).folder(), model.config.vocab_size)
    notes = gguf.notes(model)
    if isinstance(found, Vocabulary):
        write_gguf(out, model, type, found)
        return notes + ([f"lost: {found.note}"] if found.note else [])
    write_gguf(out, model, type)
    return [*notes, f"without a vocabulary, so that llama.cpp takes token ids alone: {found}"]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer from one folder to another, if there are any."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def text_bytes(stream: TokenStream, tokenizer: "PreTrainedTokenizerFast") -> int:
    """Bytes of UTF-8 that a stream's tokens stand for."""
    ends = [*stream.starts[1:].tolist(), len(stream.tokens)]
    texts = (
        tokenizer.decode(stream.tokens[first:last].tolist(), skip_special_tokens=True)
        for first, last in zip(stream.starts.tolist(), ends, strict=True)
    )
    return sum(len(str(text).encode()) for text in texts)


def _tokenizer(texts: Texts, quiet: bool) -> "PreTrainedTokenizerFast":
    if texts.tokenizer == "bytes":
        return byte_tokenizer()
    if not texts.tokenizer.isdecimal():
        return load_tokenizer(texts.tokenizer)
    size = int(texts.tokenizer)
    trained = decided_by_first(
        lambda: train_tokenizer(texts_of(texts.files, texts.column), size, quiet=quiet).backend_tokenizer.to_str()
    )
    return tokenizer_from_json(trained)


def _store(
    out: Path, model: MambaForCausalLM, tokenizer: "PreTrainedTokenizerFast", trained: Trained, texts: Texts
) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    summary: dict[str, Any] = {
        "data": [str(file) for file in texts.files],
        "parameters": trained.parameters,
        "held_out": {
            "tokens": trained.held_out.tokens,
            "nats_per_token": trained.held_out.nats_per_token,
            "nats_per_byte": trained.held_out.nats_per_byte,
        },
        "training": trained.record.model_dump(mode="json"),
        "torch": torch.__version__,
    }

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", summary)

    write_folder(out, fill)
