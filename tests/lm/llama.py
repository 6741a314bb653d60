"""llama.cpp by its low-level interface: logits of token ids, and the ids of a text."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

LONGEST = 64  # tokens


@cache
def _llama() -> tuple[Any, Any]:
    """Its module, and what swallows its log, which has to live as long as the library."""
    llama = pytest.importorskip("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    return llama, silent


def logits_of_llama(path: Path, tokens: list[int]) -> Tensor:
    """(length, vocab_size) that llama.cpp gives after each token of one sequence."""
    llama, _ = _llama()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, "llama.cpp does not open it"
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = LONGEST
    settings.n_threads = settings.n_threads_batch = 1
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), vocabulary)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.from_numpy(found)


def tokens_of_llama(path: Path, text: str) -> list[int]:
    """The ids that llama.cpp cuts a text into."""
    llama, _ = _llama()
    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    assert model, "llama.cpp does not open it"
    ids, raw = (llama.llama_token * 1000)(), text.encode()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), raw, len(raw), ids, len(ids), False, True)
    llama.llama_model_free(model)
    return list(ids[:count])
