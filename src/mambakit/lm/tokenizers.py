"""Tokenizers in transformers' form: bytes as they are, or byte-pair encoding trained on the user's texts.

Both know every text, and have one special token, which ends a document and pads.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mambakit.errors import ArtefactError, DataError

END = "<|endoftext|>"
BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte of UTF-8: ids 0 to 255, and 256 for the end of a document.

    >>> byte_tokenizer()("hé")["input_ids"]
    [104, 195, 169]
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())}
    return _wrapped(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, quiet: bool = False) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of `vocab_size` tokens, the one special among them, trained on texts as they come.

    Raises DataError for fewer tokens than there are bytes, or texts too small for so many.
    """
    if vocab_size <= BYTES:
        raise DataError(f"vocab_size must be above {BYTES}, the number of bytes, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=not quiet,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size - 1:
        raise DataError(
            f"the texts give {tokenizer.get_vocab_size() + 1} tokens and not {vocab_size}: lower the vocabulary's size"
        )
    return _wrapped(tokenizer, use_regex=True)


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer again, from the text of its tokenizer.json."""
    return _wrapped(Tokenizer.from_str(text), use_regex=True)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a model; raises ArtefactError where there is none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ArtefactError(f"{folder} has no tokenizer.json: name a folder that has one with --tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _wrapped(tokenizer: Tokenizer, *, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _characters_of_bytes() -> list[str]:
    """The character that stands for each byte in byte-level encodings: its own where it can be printed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]
