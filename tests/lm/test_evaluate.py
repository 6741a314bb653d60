"""Evaluation carries the state through each document, whatever the chunks."""

import math
from pathlib import Path

import pytest
import torch
from tests.lm.small import model_of

from mambakit.errors import DataError
from mambakit.lm import byte_tokenizer
from mambakit.lm.data import tokenize
from mambakit.lm.evaluate import evaluate
from mambakit.lm.workflow import text_bytes

TEXTS = ["first text é", "x", "and a second"]


@pytest.mark.parametrize("chunk", [3, 100])
def test_every_token_but_a_document_s_first_is_predicted_from_all_before_it(chunk: int, tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), model_of("mamba2", vocab_size=264)
    stream = tokenize((iter([text]) for text in TEXTS), tokenizer, tmp_path)
    found = evaluate(model, stream, text_bytes(stream, tokenizer), chunk=chunk)
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[*text.encode(), 256]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.tokens == found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / found.tokens / math.log(2), rel=1e-5)


def test_a_bounded_context_is_that_of_windows_which_start_anew(tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), model_of("mamba", vocab_size=264)
    stream = tokenize([iter(["0123456789"])], tokenizer, tmp_path)  # eleven tokens with the end
    ids = torch.tensor([[*b"0123456789", 256]])
    with torch.no_grad():
        logits = [model(ids[:, low : low + 4]).logits[0] for low in (0, 2, 4, 6)]
        rows = torch.cat([logits[0], *(part[2:] for part in logits[1:])])
    nats = float(torch.nn.functional.cross_entropy(rows, ids[0, 1:], reduction="sum"))
    found = evaluate(model, stream, 10, context=4)
    assert (found.tokens, found.nats) == (10, pytest.approx(nats, rel=1e-5))
    assert found.nats != pytest.approx(evaluate(model, stream, 10).nats, rel=1e-6)
    with pytest.raises(DataError, match="context must be at least 2"):
        evaluate(model, stream, 10, context=1)


def test_a_text_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    stream = tokenize([iter(["ab"])], byte_tokenizer(), tmp_path)
    with pytest.raises(DataError, match="wrong tokenizer"):
        evaluate(model_of("mamba"), stream, 2)
