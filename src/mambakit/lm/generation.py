"""The lean loop: tokens one after another from the state alone; a step is one native call, or on a GPU one CUDA graph.

    decoder = Decoder(model)
    decoder.read(prompt)                       # in chunks, whatever its length
    for token in decoder.generate(100): ...

transformers' `generate` works too and can do more; this one does less around each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mambakit.errors import DataError
from mambakit.lm.cache import StateCache, check_batch
from mambakit.lm.model import MambaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 2048  # tokens of a prompt that are in memory at a time


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest; None: among all.
        top_p: draw among the likeliest that have this share together; None: among all.
        seed: fixes the draws; None: draws of torch's own generator.

    Raises DataError for a value out of bounds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise DataError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and not (self.top_k is None and self.top_p is None and self.seed is None):
            raise DataError("temperature 0 draws nothing: leave top_k, top_p and seed out")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What the draws come from."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens (batch,) from logits (batch, vocab_size)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        nothing = torch.empty(0, dtype=torch.long)  # the warpers take the tokens so far, and read none
        if self.temperature != 1:
            logits = TemperatureLogitsWarper(float(self.temperature))(nothing, logits)
        if self.top_k is not None:
            logits = TopKLogitsWarper(self.top_k)(nothing, logits)
        if self.top_p is not None and self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(nothing, logits)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class Decoder:
    """A model and what it has read; steps are in float32 and record no gradients.

    Args:
        model: in eval mode.
        batch: rows that advance together.
        chunk: tokens of a prompt that are read at a time.

    Attributes:
        logits: (batch, vocab_size) of the next token; None before the first.
        length: tokens read in each row, padding included.
    """

    def __init__(self, model: MambaForCausalLM, batch: int = 1, *, chunk: int = CHUNK) -> None:
        if chunk < 1:
            raise DataError(f"chunk must be at least 1, got {chunk}")
        self.model, self.batch, self.chunk = model, batch, chunk
        self.logits: Tensor | None = None
        self.length = 0
        self._stepper = model.stepper(batch)

    @property
    def backend(self) -> str:
        """Who takes the steps: see `mambakit.nn.Stepper`."""
        return self._stepper.backend

    @property
    def reason(self) -> str:
        """Why the layers take them; empty where they don't."""
        return self._stepper.reason

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Read (batch, length) tokens; attention_mask (batch, length) is 0 for padding, on the left.

        Raises ValueError for shapes that don't fit, and where a row ends in padding.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids must have shape ({self.batch}, length) with a token at least, got {tuple(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
            )
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("attention_mask must not end in 0: pad on the left")
        if attention_mask is None and (logits := self._stepper.read(input_ids)) is not None:
            self.logits, self.length = logits, self.length + input_ids.shape[1]
            return
        cache = self.cache()
        for first in range(0, input_ids.shape[1], self.chunk):
            part = slice(first, first + self.chunk)
            output = self.model(
                input_ids[:, part],
                attention_mask=None if attention_mask is None else attention_mask[:, part],
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.load(output.cache)
        self.logits = output.logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, (batch,); returns the logits (batch, vocab_size) of the next."""
        self.logits = self._stepper(tokens)
        self.length += 1
        return self.logits

    def generate(
        self, max_new_tokens: int, sampling: Sampling | None = None, *, end: int | Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """Yield tokens (batch,), each once it is drawn, until `max_new_tokens` or until every row has ended.

        Args:
            sampling: how they are drawn; None: the likeliest.
            end: the token, or tokens, that end a row; what follows one in its row repeats the first of them.

        Raises ValueError where nothing was read.
        """
        if self.logits is None:
            raise ValueError("there is nothing to go on from: read a prompt first")
        how = Sampling(temperature=0) if sampling is None else sampling
        generator = how.generator(self.logits.device)
        ends = torch.tensor([end] if isinstance(end, int) else list(end or []), device=self.logits.device)
        ended = torch.zeros(self.batch, dtype=torch.bool, device=self.logits.device)
        for _ in range(max_new_tokens):
            tokens = how.draw(self.logits, generator)
            if len(ends):
                tokens = torch.where(ended, ends[0], tokens)
                ended |= torch.isin(tokens, ends)
            self.step(tokens)
            yield tokens
            if len(ends) and ended.all():  # which waits for a GPU
                return

    def cache(self) -> StateCache:
        """What was read so far, to keep, store or give to the model."""
        if not self.length:
            return StateCache(None, 0)
        return StateCache(self._stepper.state, self.length)

    def load(self, cache: StateCache) -> None:
        """Carry on from a cache; the next thing to do is to read."""
        if cache.state is None:
            self._stepper.reset()
        else:
            check_batch(cache.state, self.batch)
            self._stepper.load(cache.state)
        self.length, self.logits = cache.length, None

    def fork(self) -> "Decoder":
        """Another decoder, which carries on from the same point on its own."""
        other = Decoder(self.model, self.batch, chunk=self.chunk)
        other.load(self.cache())
        other.logits = self.logits
        return other


def generate_text(
    decoder: Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Read a prompt and yield the text that follows, piece by piece; it ends before any of the strings `stop`.

    Raises DataError where the prompt has no tokens.
    """
    from tokenizers.decoders import DecodeStream

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise DataError("the prompt is empty: give at least one character")
    device = decoder.model.device
    decoder.read(ids.to(device))
    pieces, held = DecodeStream(skip_special_tokens=True), ""
    for token in decoder.generate(max_new_tokens, sampling, end=tokenizer.eos_token_id):
        if int(token) == tokenizer.eos_token_id:
            break
        held += pieces.step(tokenizer.backend_tokenizer, int(token)) or ""
        found = [position for string in stop if (position := held.find(string)) >= 0]
        if found:
            held = held[: min(found)]
            break
        ready = len(held) - _begun(held, stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stop`."""
    lengths = (n for string in stop for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n]))
    return max(lengths, default=0)
