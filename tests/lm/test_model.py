"""The model in transformers' form: state, padding, documents, loss, initial weights."""

import math
from pathlib import Path

import pytest
import torch
from tests.lm.small import FAMILIES, STOCK, VOCABULARY, model_of, tokens

from mambakit.errors import ArtefactError, DataError
from mambakit.lm import StateCache

ATOL = 1e-5


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_the_cache_goes_by_each_of_its_names(name: str) -> None:
    model, prompt, more = model_of("mamba2"), tokens(2, 5), tokens(2, 3)
    output = model(prompt)
    cache = getattr(output, name)
    assert cache is output["cache"]
    expected = model(torch.cat([prompt, more], dim=1)).logits[:, 5:]
    torch.testing.assert_close(model(more, **{name: cache.fork()}).logits, expected, atol=ATOL, rtol=1e-4)
    with pytest.raises(ValueError, match="are one argument"):
        model(more, cache=cache, past_key_values=cache, cache_params=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_carry_the_cache_give_the_logits_of_the_whole(family: str) -> None:
    model, prompt = model_of(family), tokens(2, 12)
    whole, cache, parts = model(prompt, use_cache=False), None, []
    assert whole.cache is None
    for chunk in prompt.split([5, 1, 6], dim=1):
        output = model(chunk, cache=cache)
        cache, parts = output.cache, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, atol=ATOL, rtol=1e-4)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_leaves_state_and_logits_those_of_single_prompts(family: str) -> None:
    model, long, short = model_of(family), tokens(1, 9), tokens(1, 4)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    padded = model(batch, attention_mask=mask)
    torch.testing.assert_close(padded.logits[:1], model(long).logits, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(padded.logits[1:, 5:], model(short).logits, atol=ATOL, rtol=1e-4)
    more = tokens(2, 3)
    longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    after = model(more, attention_mask=longer, past_key_values=padded.past_key_values)
    alone = model(torch.cat([short, more[1:]], dim=1))
    torch.testing.assert_close(after.logits[1:], alone.logits[:, 4:], atol=ATOL, rtol=1e-4)


def test_a_row_of_padding_alone_keeps_its_state() -> None:
    model, prompt = model_of("mamba"), tokens(2, 6)
    cache = model(prompt).past_key_values
    mask = torch.tensor([[1, 1], [0, 0]])
    after = model(tokens(2, 2), attention_mask=mask, past_key_values=cache.fork()).past_key_values
    assert torch.equal(after.state[0].ssm[1], cache.state[0].ssm[1])
    assert not torch.equal(after.state[0].ssm[0], cache.state[0].ssm[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens", "cu_seq_lens_q", "seq_idx"])
def test_a_document_in_a_pack_knows_nothing_of_its_neighbours(family: str, how: str) -> None:
    model, first, second = model_of(family), tokens(1, 7), tokens(1, 5)
    bounds = {
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None],
        "cu_seqlens": torch.tensor([0, 7, 12]),
        "cu_seq_lens_q": torch.tensor([0, 7, 12]),
        "seq_idx": torch.tensor([[0] * 7 + [1] * 5]),
    }[how]
    packed = model(torch.cat([first, second], dim=1), **{how: bounds}).logits
    torch.testing.assert_close(packed[:, 7:], model(second).logits, atol=ATOL, rtol=1e-4)
    other = model(torch.cat([tokens(1, 7), second], dim=1), **{how: bounds}).logits
    assert torch.equal(packed[:, 7:], other[:, 7:])
    assert not torch.equal(packed[:, :7], other[:, :7])


def test_gradients_do_not_cross_the_bounds_of_documents() -> None:
    model = model_of("mamba")
    embedded = model.get_input_embeddings()(tokens(1, 12)).detach().requires_grad_()
    model(inputs_embeds=embedded, cu_seqlens=torch.tensor([0, 7, 12])).logits[:, 7:].sum().backward()
    assert embedded.grad[:, :7].abs().max() == 0
    assert embedded.grad[:, 7:].abs().min() > 0


def test_the_loss_of_a_pack_is_that_of_its_documents() -> None:
    model, first, second = model_of("mamba"), tokens(1, 7), tokens(1, 5)
    both = torch.cat([first, second], dim=1)
    packed = model(both, labels=both, cu_seqlens=torch.tensor([0, 7, 12])).loss
    alone = [model(one, labels=one).loss for one in (first, second)]
    torch.testing.assert_close(packed, (6 * alone[0] + 4 * alone[1]) / 10)


def test_the_loss_of_half_precision_is_that_of_its_logits() -> None:
    model, ids = model_of("mamba").to(torch.bfloat16), tokens(2, 9)
    output = model(ids, labels=ids)
    assert (output.logits.dtype, model(ids).logits.dtype) == (torch.bfloat16, torch.float32)
    rows = output.logits[:, :-1].double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(rows, ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    halved = model(ids, labels=ids, num_items_in_batch=32).loss
    torch.testing.assert_close(halved, output.loss / 2)


def test_a_loss_of_ones_own_takes_the_place_of_the_models() -> None:
    model, ids = model_of("mamba"), tokens(2, 9)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + labels.sum()
    assert model(ids, labels=ids).loss == ids.sum()


@pytest.mark.parametrize("family", STOCK)
def test_the_loss_and_hidden_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    from mambakit.lm import MambaForCausalLM

    stock, prompt = STOCK[family](), tokens(2, 9)
    stock.save_pretrained(tmp_path)
    ours = MambaForCausalLM.from_pretrained(tmp_path)
    theirs = stock(prompt, labels=prompt, output_hidden_states=True)
    found = ours(prompt, labels=prompt, output_hidden_states=True)
    torch.testing.assert_close(found.loss, theirs.loss)
    assert len(found.hidden_states) == len(theirs.hidden_states)
    for mine, their in zip(found.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-4, rtol=1e-4)
    part = ours(prompt, logits_to_keep=2).logits
    torch.testing.assert_close(part, found.logits[:, -2:])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, prompt = model_of("hybrid").train(), tokens(2, 8)
    model(prompt, labels=prompt).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(prompt, labels=prompt).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_initial_weights_are_those_of_the_papers() -> None:
    from mambakit.lm import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=64, num_hidden_layers=4))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = model.backbone.layers[0].mixer
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(128) / math.sqrt(4), rel=0.01)
    assert torch.equal(mixer.A_log[0], torch.arange(1, 17).float().log())


def test_dropout_acts_in_training_alone() -> None:
    model, prompt = model_of("mamba", dropout=0.5), tokens(1, 6)
    assert torch.equal(model(prompt).logits, model(prompt).logits)
    model.train()
    assert not torch.equal(model(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_state_goes_on_where_it_was(family: str, tmp_path: Path) -> None:
    model, prompt, more = model_of(family), tokens(2, 7), tokens(2, 3)
    cache = model(prompt).past_key_values
    cache.save(tmp_path / "state.safetensors")
    restored = StateCache.load(tmp_path / "state.safetensors", model)
    assert restored.get_seq_length() == 7
    expected = model(more, past_key_values=cache.fork()).logits
    assert torch.equal(model(more, past_key_values=restored).logits, expected)


def test_forks_go_their_own_ways() -> None:
    model, prompt = model_of("mamba"), tokens(1, 7)
    cache = model(prompt).past_key_values
    one, other = tokens(1, 4), tokens(1, 4)
    found = [model(more, past_key_values=cache.fork()).logits for more in (one, other, one)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert cache.get_seq_length() == 7


def test_a_state_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model_of("mamba")(tokens(1, 3)).past_key_values.save(path)
    with pytest.raises(ArtefactError, match="state of another model"):
        StateCache.load(path, model_of("mamba2"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ArtefactError, match="not a stored state"):
        StateCache.load(path, model_of("mamba"))


def test_wrong_calls_are_refused() -> None:
    model, prompt = model_of("mamba"), tokens(2, 5)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="unexpected argument 'head_mask'"):
        model(prompt, head_mask=None)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(prompt, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="no state to carry on from"):
        model(prompt, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=True)
    with pytest.raises(ValueError, match="holds 2 rows, but the batch has 1"):
        model(prompt[:1], past_key_values=model(prompt).past_key_values)
    model.backbone.layers[0].mixer.conv1d = torch.nn.Sequential(model.backbone.layers[0].mixer.conv1d)
    with pytest.raises(DataError, match="leave conv1d out"):
        model(prompt)


def test_embeddings_can_be_resized() -> None:
    model = model_of("mamba", tie_word_embeddings=True)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert model(tokens(1, 3)).logits.shape[-1] == VOCABULARY + 8
    assert model.lm_head.weight is model.backbone.embeddings.weight
