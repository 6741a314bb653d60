"""Generation: transformers' own, the lean loop, and both against each other."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.lm.small import FAMILIES, STOCK, model_of, tokens, transformers
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lm import Decoder, MambaConfig, MambaForCausalLM, Sampling, StateCache, byte_tokenizer, generate_text


def _greedy(model: MambaForCausalLM, prompt: Tensor, new: int = 8, **options: object) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)[
        :, prompt.shape[1] :
    ]


def _without_cache(model: MambaForCausalLM, prompt: Tensor, new: int = 8) -> Tensor:
    for _ in range(new):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt[:, -new:]


def _lean(model: MambaForCausalLM, prompt: Tensor, new: int = 8, chunk: int = 4, mask: Tensor | None = None) -> Tensor:
    decoder = Decoder(model, prompt.shape[0], chunk=chunk)
    decoder.read(prompt, mask)
    return torch.stack(list(decoder.generate(new)), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_the_likeliest_tokens_gives_the_same(family: str) -> None:
    model, prompt = model_of(family), tokens(2, 9)
    expected = _without_cache(model, prompt)
    assert torch.equal(_greedy(model, prompt), expected)
    assert torch.equal(_greedy(model, prompt, prefill_chunk_size=4), expected)
    assert torch.equal(_greedy(model, prompt, use_cache=False), expected)
    assert torch.equal(_lean(model, prompt), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_padded_on_the_left_gives_what_single_prompts_give(family: str) -> None:
    model, long, short = model_of(family), tokens(1, 9), tokens(1, 4)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    mask = (torch.arange(9) >= torch.tensor([[0], [5]])).long()
    expected = torch.cat([_without_cache(model, long), _without_cache(model, short)])
    assert torch.equal(_greedy(model, batch, attention_mask=mask), expected)
    assert torch.equal(_greedy(model, batch, attention_mask=mask, prefill_chunk_size=3), expected)
    # The first chunk of the second row is padding alone.
    assert torch.equal(_lean(model, batch, mask=mask, chunk=3), expected)


@pytest.mark.parametrize("family", ["mamba", "hybrid"])
def test_beams_score_what_the_model_scores(family: str) -> None:
    model, prompt = model_of(family), tokens(2, 5)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        num_beams=4,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log = model(found.sequences, use_cache=False).logits[:, 4:-1].log_softmax(-1)
    scores = log.gather(2, found.sequences[:, 5:, None])[..., 0].sum(1) / 4
    torch.testing.assert_close(found.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_beams_are_those_of_transformers(tmp_path: Path) -> None:
    stock, prompt = STOCK["mamba"](), tokens(2, 6)
    stock.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    ours = MambaForCausalLM.from_pretrained(tmp_path).generate(prompt, **options)
    assert torch.equal(ours, stock.generate(prompt, **options))


def test_sampling_follows_its_seed_and_its_bounds() -> None:
    model, prompt = model_of("mamba"), tokens(1, 5)

    def drawn(**how: object) -> list[int]:
        decoder = Decoder(model)
        decoder.read(prompt)
        return [int(token) for token in decoder.generate(12, Sampling(**how))]

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    greedy = _lean(model, prompt, 12)[0].tolist()
    assert drawn(top_k=1, seed=3) == greedy
    assert drawn(top_p=1e-6, seed=3) == greedy
    assert drawn(temperature=1e-3, seed=3) == greedy
    torch.manual_seed(5)
    first = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=6)
    torch.manual_seed(5)
    assert torch.equal(
        first, model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=6)
    )


def test_draws_have_the_softmax_s_frequencies() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, -1)
    shares = torch.bincount(Sampling(temperature=2.0, seed=0).draw(logits, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(shares / 20000, (logits[0] / 2).softmax(0), atol=0.015, rtol=0)


def test_a_row_that_ended_repeats_its_end_and_the_loop_stops_when_all_have() -> None:
    model, prompt = model_of("mamba"), tokens(2, 5)
    expected = _lean(model, prompt, 12)
    end = int(expected[0, 3])
    decoder = Decoder(model, 2)
    decoder.read(prompt)
    found = torch.stack(list(decoder.generate(12, end=end)), dim=1)
    first = expected[0].tolist().index(end)
    assert found[0, first:].unique().tolist() == [end]
    assert torch.equal(found[0, :first], expected[0, :first])
    alone = Decoder(model)
    alone.read(prompt[:1])
    assert len(list(alone.generate(12, end=[end, 39]))) <= first + 1


def test_a_decoder_is_forked_stored_and_restored(tmp_path: Path) -> None:
    model, prompt = model_of("mamba2"), tokens(1, 6)
    decoder = Decoder(model)
    decoder.read(prompt)
    list(islice(decoder.generate(9), 3))
    decoder.cache().save(tmp_path / "state.safetensors")
    fork = decoder.fork()
    expected = list(decoder.generate(5))
    assert list(fork.generate(5)) == expected
    restored = Decoder(model)
    restored.load(StateCache.load(tmp_path / "state.safetensors", model))
    more = tokens(1, 2)
    restored.read(more)
    whole = Decoder(model)
    whole.read(torch.cat([prompt, _lean(model, prompt, 3), more], dim=1))
    torch.testing.assert_close(restored.logits, whole.logits, atol=1e-4, rtol=1e-4)
    assert restored.length == whole.length == 11


def _text_model() -> tuple[MambaForCausalLM, object]:
    tokenizer = byte_tokenizer()
    settings = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = MambaForCausalLM(settings).eval()
    with torch.no_grad():  # lower-case letters only
        model.get_input_embeddings().weight.mul_(50)
        model.lm_head.weight.zero_()
        model.lm_head.weight[97:123] = torch.randn(26, 16)
    return model, tokenizer


def test_the_pipeline_the_streamer_and_stop_strings_work() -> None:
    model, tokenizer = _text_model()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipeline("hello", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    lean = "".join(generate_text(Decoder(model), tokenizer, "hello", 20))
    assert text == "hello" + lean
    assert len(lean) == 20
    pieces = pipeline(["hello", "a longer one"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert pieces[0][0]["generated_text"] == "hello" + lean[:6]
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokenizer("hello", return_tensors="pt")
    model.generate(**ids, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert "".join(streamer) == lean
    stop = lean[4:6]
    assert len(set(lean)) > 3
    assert lean.index(stop) == 4
    stopped = model.generate(**ids, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]) == "hello" + lean[: lean.index(stop) + 2]
    assert "".join(generate_text(Decoder(model), tokenizer, "hello", 20, stop=[stop])) == lean[: lean.index(stop)]


def test_the_state_of_generate_can_be_carried_on() -> None:
    model, prompt = model_of("mamba"), tokens(1, 6)
    first = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    more = _greedy(model, first.sequences, 4, past_key_values=first.past_key_values)
    assert torch.equal(more, _greedy(model, prompt, 8)[:, 4:])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_graph_of_the_whole_model_generates_what_the_model_does(family: str, batch: int) -> None:
    model, prompt = model_of(family).cuda(), tokens(batch, 9).cuda()
    decoder = Decoder(model, batch)
    for _ in range(5):  # the second time, the graph of the first; from the fourth on the prompt by graphs as well
        decoder.load(StateCache())
        decoder.read(prompt)
        assert torch.equal(torch.stack(list(decoder.generate(8)), dim=1), _without_cache(model, prompt))
    assert decoder.backend == "graph"
    other = decoder.fork()
    assert torch.equal(torch.stack(list(other.generate(3))), torch.stack(list(decoder.generate(3))))


def test_wrong_settings_are_refused() -> None:
    model = model_of("mamba")
    with pytest.raises(DataError, match="temperature 0 draws nothing"):
        Sampling(temperature=0, top_k=3)
    with pytest.raises(DataError, match="top_p must be"):
        Sampling(top_p=1.5)
    with pytest.raises(ValueError, match="read a prompt first"):
        next(Decoder(model).generate(3))
    with pytest.raises(ValueError, match="pad on the left"):
        Decoder(model).read(tokens(1, 2), torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="one of attention"):
        _greedy(model, tokens(1, 3), cache_implementation="static")
    text_model, tokenizer = _text_model()
    with pytest.raises(DataError, match="prompt is empty"):
        list(generate_text(Decoder(text_model), tokenizer, "", 3))
