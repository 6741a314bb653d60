"""How well a model predicts a text: the state is carried from its first token to its last, so nothing is cut.

Attention knows no positions beyond those that it was trained on. A model of it is given a `context`: it then reads
windows of so many tokens, each half over the one before, and predicts the half that is new.

perplexity = exp(nats / token)        bits / byte = nats / (bytes ln 2)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from mambakit.errors import DataError
from mambakit.lm.data import TokenStream
from mambakit.lm.model import MambaForCausalLM

CHUNK = 1024  # tokens that are read at a time


@dataclass(frozen=True)
class Evaluation:
    """What was found on a text."""

    tokens: int  # that were predicted
    text_bytes: int  # of UTF-8
    nats: float  # sum of the negative log-likelihoods
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the power of `nats_per_token`."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def nats_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / self.text_bytes

    @property
    def bits_per_byte(self) -> float:
        """The same in bits."""
        return self.nats_per_byte / math.log(2)

    @property
    def tokens_per_second(self) -> float:
        """How fast they were read."""
        return self.tokens / self.seconds


@torch.no_grad()
def evaluate(
    model: MambaForCausalLM,
    stream: TokenStream,
    text_bytes: int,
    *,
    chunk: int = CHUNK,
    context: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """Read every document from its start to its end and predict each token but its first.

    Args:
        model: in eval mode.
        text_bytes: bytes of the text, for the numbers by byte.
        chunk: tokens at a time; the result does not depend on it.
        context: tokens that a prediction may look back on, at least half of them; None: all.
        on_tokens: called with the tokens of each chunk.

    Raises DataError where no document has two tokens, a token is outside the model's vocabulary, or the context is
    shorter than 2.
    """
    if context is not None and context < 2:
        raise DataError(f"context must be at least 2 tokens, got {context}")
    largest = int(np.max(stream.tokens))
    if largest >= model.config.vocab_size:
        raise DataError(
            f"the text has the token {largest}, but the model knows {model.config.vocab_size}: wrong tokenizer"
        )
    started, nats, predicted = time.perf_counter(), 0.0, 0
    ends = [*stream.starts[1:].tolist(), len(stream.tokens)]
    for first, last in zip(stream.starts.tolist(), ends, strict=True):
        cache, low = None, first
        while low < last - 1:
            if context is None:
                begin, high = low, min(low + chunk, last - 1)
            else:  # from half a window back, but for the first
                begin = max(first, low - context // 2)
                high, cache = min(begin + context, last - 1), None
            ids = torch.from_numpy(stream.tokens[begin : high + 1].astype(np.int64)).to(model.device)
            output = model(ids[None, :-1], cache=cache, use_cache=context is None)
            cache = output.cache
            new = low - begin
            nats += float(F.cross_entropy(output.logits[0, new:], ids[1 + new :], reduction="sum"))
            predicted += high - low
            if on_tokens is not None:
                on_tokens(high - low)
            low = high
    if predicted == 0:
        raise DataError("there is nothing to predict: every document has a single token")
    return Evaluation(predicted, text_bytes, nats, time.perf_counter() - started)
