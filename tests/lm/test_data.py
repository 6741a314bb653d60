"""Tokens on disk and windows of them: documents are whole, and nothing of one is seen from another."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from tests.lm.small import model_of

from mambakit.errors import DataError
from mambakit.lm import byte_tokenizer
from mambakit.lm.data import Draws, TokenStream, Windows, read_documents, tokenize
from mambakit.lm.train import objective, prepare


def _stream(texts: list[str], tmp_path: Path) -> TokenStream:
    return tokenize((iter([text]) for text in texts), byte_tokenizer(), tmp_path)


def test_documents_lie_end_to_end_each_with_its_end(tmp_path: Path) -> None:
    stream = _stream(["ab", "", "cde"], tmp_path)
    assert stream.tokens.tolist() == [97, 98, 256, 99, 100, 101, 256]
    assert stream.starts.tolist() == [0, 3]
    assert isinstance(stream.tokens, np.memmap)


def test_text_is_one_document_and_parquet_rows_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo é\r\n", encoding="utf-8", newline="")
    parquet.write_table(pa.table({"text": ["three", None, "four"], "n": [1, 2, 3]}), tmp_path / "b.parquet")
    documents = ["".join(pieces) for pieces in read_documents([tmp_path / "a.txt", tmp_path / "b.parquet"])]
    assert documents == ["one\ntwo é\r\n", "three", "four"]


def test_a_text_longer_than_a_block_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambakit.lm.data._BLOCK", 10)
    text = "a line\nand one that is longer than a block is\nend"
    (tmp_path / "a.txt").write_text(text)
    stream = tokenize(read_documents([tmp_path / "a.txt"]), byte_tokenizer(), tmp_path)
    assert bytes(stream.tokens[:-1].tolist()) == text.encode()
    assert stream.starts.tolist() == [0]


def test_the_last_share_is_split_off_through_a_document(tmp_path: Path) -> None:
    first, last = _stream(["abcd", "efgh"], tmp_path).split(0.3)
    assert first.tokens.tolist() == [97, 98, 99, 100, 256, 101, 102]
    assert first.starts.tolist() == [0, 5]
    assert last.tokens.tolist() == [103, 104, 256]
    assert last.starts.tolist() == [0]


def test_windows_know_where_documents_start(tmp_path: Path) -> None:
    windows = Windows(_stream(["ab", "cde"], tmp_path), 3)
    batch = windows.batch(torch.arange(2))
    assert batch["tokens"].tolist() == [[97, 98, 256], [99, 100, 101]]
    assert batch["starts"].tolist() == [[True, False, False], [True, False, False]]
    assert windows.at(torch.tensor([1]))["starts"].tolist() == [[False, False, True]]


def test_a_window_s_loss_is_that_of_its_documents_alone() -> None:
    model = model_of("mamba", vocab_size=40).eval()
    tokens = torch.randint(3, 40, (2, 6))
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 4] = True
    loss, _ = objective(model, prepare({"tokens": tokens, "starts": starts}))
    parts = [tokens[:1, :4], tokens[:1, 4:], tokens[1:]]
    alone = [model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    torch.testing.assert_close(loss, sum(alone) / 9)
    starts[0, 4] = False
    leaked, _ = objective(model, prepare({"tokens": tokens, "starts": starts}))
    assert (leaked - loss).abs() > 1e-3


def test_every_epoch_draws_windows_from_everywhere_by_its_seed(tmp_path: Path) -> None:
    draws = Draws(Windows(_stream(["abcdefgh"], tmp_path), 4), 3)
    seen = []
    for _ in range(30):
        seen.extend(prepare(draws.batch(torch.arange(3)), draws)["tokens"][:, 0].tolist())
    assert set(seen) == set(range(97, 103)), "every window of four, the last with the document's end"
    assert len(seen) == 90
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(draws.draw(20)["tokens"].tolist())
    assert found[0] == found[1] != found[2]


def test_files_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "bad.parquet").write_bytes(b"ab")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    cases = [("none.txt", "not there"), ("bad.txt", "not UTF-8 at byte 2"), ("bad.parquet", "not a Parquet")]
    cases.append(("other.parquet", "no column text: expected one of body"))
    for name, words in cases:
        with pytest.raises(DataError, match=words):
            tokenize(read_documents([tmp_path / name]), byte_tokenizer(), tmp_path / "t")
    with pytest.raises(DataError, match="no text"):
        _stream([""], tmp_path / "e")
    with pytest.raises(DataError, match="lower the context"):
        Windows(_stream(["ab"], tmp_path / "f"), 10)
