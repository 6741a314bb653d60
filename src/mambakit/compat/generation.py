"""`mamba_ssm.utils.generation`: greedy decoding and sampling, one token after another."""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.compat.inference import InferenceParams
from mambakit.compat.refusal import NotServed


class DecoderOutput(NamedTuple):
    """What `generate` returns with return_dict_in_generate."""

    sequences: Tensor  # (batch, length), the prompt and what follows
    scores: tuple[Tensor, ...] | None  # (batch, vocabulary) of each new token; None unless asked for


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw a token (batch,) from logits (batch, vocabulary).

    top_k = 1 takes the likeliest; top_k > 1 draws among that many, top_p (0 for all) among the likeliest that together
    hold that probability; top_k = 0 draws from all, where min_p (0 for all) leaves those whose probability is at least
    that share of the likeliest's. (mamba_ssm compares logits there, of the first token at that.)
    """
    if top_k < 0 or not 0 <= top_p <= 1 or not 0 <= min_p <= 1 or temperature <= 0:
        raise NotServed(
            "top_k must not be negative, top_p and min_p lie in [0, 1] and temperature be positive, got "
            f"top_k={top_k}, top_p={top_p}, min_p={min_p}, temperature={temperature}"
        )
    if top_k == 1:
        return logits.argmax(dim=-1)
    if min_p > 0 and top_k > 0:
        raise NotServed("min_p goes with top_k=0: leave out one of them")
    logits = logits.float() / temperature
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if 0 < top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).scatter(-1, places, before >= top_p), -torch.inf)
    if min_p > 0:
        chances = logits.softmax(-1)
        logits = logits.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> DecoderOutput:
    """Carry input_ids (batch, length) on to max_length tokens, or until every row has just said eos_token_id.

    teacher_outputs (batch, length) are taken in place of draws as far as they go; vocab_size cuts padding off the
    logits; enable_timing prints the time taken; streamer gets the tokens by `put` and `end`. Raises NotServed for
    `cg`, CUDA graphs: the result is the same without.
    """
    if cg:
        raise NotServed("cg=True asks for CUDA graphs: leave it out, the result is the same")
    if streamer is not None:
        streamer.put(input_ids.cpu())
    started = time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    scores: list[Tensor] = []
    sequence, newest = input_ids, input_ids
    while sequence.shape[1] < max_length:
        logits = model(newest, inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]
        params.seqlen_offset += newest.shape[1]
        if output_scores:
            scores.append(logits.clone())
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            newest = teacher_outputs[:, params.seqlen_offset, None]
        else:
            newest = sample(_penalised(logits, sequence, repetition_penalty), top_k, top_p, min_p, temperature)[:, None]
        sequence = torch.cat([sequence, newest], dim=1)
        if streamer is not None:
            streamer.put(newest.cpu())
        if eos_token_id is not None and bool((newest == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - started):.0f}ms")
    return DecoderOutput(sequence, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Gives a model with `logits` and `inference_params` the method `generate`."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | DecoderOutput:
        """`decode` with this model: the tokens (batch, length), or all that it returns."""
        output = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs
        )
        return output if return_dict_in_generate else output.sequences


def _penalised(logits: Tensor, sequence: Tensor, penalty: float) -> Tensor:
    """Logits of tokens seen before made less likely (arXiv 1909.05858)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(1, sequence)
    return logits.scatter(1, sequence, torch.where(seen < 0, seen * penalty, seen / penalty))
