"""Tokenizers: what they encode they decode, and a folder keeps them."""

from pathlib import Path

import pytest
from tests.lm.small import transformers

from mambakit.errors import ArtefactError, DataError
from mambakit.lm import byte_tokenizer, load_tokenizer, train_tokenizer

TEXT = "To be, or not to be:\n\tthat is the question. Être ou ne pas être. 生存 🙂\r\n"


def test_bytes_are_their_own_ids() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    assert len(tokenizer) == 257


def test_a_trained_tokenizer_is_shorter_and_keeps_every_text() -> None:
    tokenizer = train_tokenizer([TEXT] * 20, 290, quiet=True)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(tokenizer("ünseen 𝄞")["input_ids"]) == "ünseen 𝄞"
    assert len(tokenizer) == 290


def test_transformers_reads_a_stored_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT)["input_ids"] == load_tokenizer(tmp_path)(TEXT)["input_ids"] == list(TEXT.encode())
    padded = again(["a", "abc"], padding=True)
    assert padded["attention_mask"][0] == [0, 0, 1], "on the left, so that generation can go on"


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="above 256"):
        train_tokenizer([TEXT], 256, quiet=True)
    with pytest.raises(DataError, match="lower the vocabulary"):
        train_tokenizer(["ab"], 5000, quiet=True)
    with pytest.raises(ArtefactError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
