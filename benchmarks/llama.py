"""llama.cpp, by the low-level interface of llama-cpp-python: token ids in, logits out, nothing around them."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Llama:
    """A GGUF in llama.cpp, on as many threads as torch has.

    Args:
        path: the file.
        prompt: tokens of the longest prompt, which is read at once.

    Raises ImportError without llama-cpp-python.
    """

    def __init__(self, path: Path, prompt: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # has to live as long as this
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(prompt, 32)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(max(prompt, 32), 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._length = 0

    def read(self, tokens: list[int]) -> np.ndarray:
        """Start afresh and read a prompt; the logits after its last token."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._length = 0
        return self._decode(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; the logits of the next."""
        return self._decode([token])

    def close(self) -> None:
        """Free everything, and hear the library's log no more."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _decode(self, tokens: list[int]) -> np.ndarray:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self._length + index
            batch.logits[index] = index == len(tokens) - 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp could not read the tokens")
        self._length += len(tokens)
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
