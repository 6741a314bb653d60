"""mamba_ssm's language model: against transformers' own with the same weights, its files, and its generation."""

import json
from pathlib import Path

import pytest
import torch
from tests.compat.agreement import assert_same

from mambakit.compat import NotServed
from mambakit.compat.generation import sample
from mambakit.compat.language_model import MambaConfig, MambaLMHeadModel
from mambakit.errors import ArtefactError, DataError

OF_MAMBA_2 = {"layer": "Mamba2", "d_state": 8, "headdim": 16}
KINDS = {"Mamba1": {"d_state": 8}, "Mamba2": OF_MAMBA_2}


def make(kind: str = "Mamba1", **further: object) -> MambaLMHeadModel:
    sizes = {"d_model": 32, "n_layer": 2, "vocab_size": 37, "ssm_cfg": KINDS[kind], **further}
    return MambaLMHeadModel(MambaConfig(**sizes), dtype=torch.float64)


def tokens(length: int = 9) -> torch.Tensor:
    return torch.randint(0, 37, (2, length))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_those_of_transformers_with_the_same_weights(kind: str, fused: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(kind, fused_add_norm=fused, residual_in_fp32=False)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 8, "residual_in_fp32": False}
    if kind == "Mamba1":
        peer = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        more = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True}
        peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **more))
    names = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    weights = {names.get(name, name): t for name, t in model.state_dict().items()}
    peer.double().eval().load_state_dict(weights)
    ids = tokens()
    # its float32 inside sets the bound
    assert_same(model(ids).logits, peer(ids, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize(
    "further", [{"d_intermediate": 16}, {"rms_norm": False}, {"d_intermediate": 16, "fused_add_norm": False}]
)
def test_a_fused_and_an_unfused_norm_are_one_function(further: dict) -> None:
    model = make(**{"residual_in_fp32": False, **further})
    ids = tokens()
    expected = model(ids).logits
    for module in model.modules():
        if hasattr(module, "fused_add_norm"):
            module.fused_add_norm = not module.fused_add_norm
    assert_same(model(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_takes_the_likeliest_token_of_the_whole_sequence_each_time(kind: str) -> None:
    model, ids = make(kind), tokens(4)
    expected = ids
    for _ in range(5):
        likeliest = model(expected).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, likeliest[:, None]], 1)
    assert torch.equal(model.generate(ids, max_length=9), expected)


def test_generation_returns_scores_and_stops_at_the_end() -> None:
    model, ids = make(), tokens(4)
    out = model.generate(ids[:1], max_length=9, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 5
    assert_same(out.scores[-1], model(out.sequences[:, :-1]).logits[:, -1])
    first = int(out.sequences[0, 4])
    assert model.generate(ids[:1], max_length=9, eos_token_id=first).shape == (1, 5)


def test_generation_follows_a_teacher_and_tells_a_streamer() -> None:
    class Streamer(list):
        put = list.append
        ended = False

        def end(self) -> None:
            self.ended = True

    streamer, teacher = Streamer(), tokens(7)
    out = make().generate(teacher[:, :3], max_length=8, teacher_outputs=teacher, streamer=streamer)
    assert torch.equal(out[:, :7], teacher)
    assert torch.equal(torch.cat([t.view(2, -1) for t in streamer], 1), out)
    assert streamer.ended


def test_a_penalty_keeps_tokens_from_coming_back() -> None:
    out = make().generate(tokens(3), max_length=15, repetition_penalty=1e9)
    assert all(len(set(row[3:].tolist())) == 12 for row in out)


def test_padding_of_the_vocabulary_is_never_said() -> None:
    model = make()
    with torch.no_grad():
        model.lm_head.weight[37:] = 1e3 * model(tokens(3)).logits.new_ones(3, 32)
    assert (model.generate(tokens(3), max_length=9, vocab_size=37)[:, 3:] < 37).all()


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 0, "top_p": 0.7}, {1, 2}),
        ({"top_k": 4, "top_p": 0.5}, {2}),
        ({"top_k": 0, "min_p": 0.3}, {1, 2}),
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_k": 0, "temperature": 0.01}, {2}),
    ],
)
def test_sampling_draws_from_the_tokens_allowed(options: dict, possible: set[int]) -> None:
    logits = torch.tensor([[0.1, 0.25, 0.55, 0.1]]).log().expand(300, -1)
    assert set(sample(logits, **options).tolist()) == possible


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model, ids = make("Mamba2", tie_embeddings=False), tokens()
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "pytorch_model.bin"]
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "model"), dtype=torch.float64)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_vocabulary_is_padded_and_the_last_logits_alone_can_be_had() -> None:
    model, ids = make(), tokens()
    logits = model(ids).logits
    assert logits.shape == (2, 9, 40)
    assert_same(model(ids, num_last_tokens=2).logits, logits[:, -2:])


def test_files_that_are_missing_or_do_not_go_together_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"config.json does not exist"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")
    make().save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "d_model": 64}))
    with pytest.raises(ArtefactError, match="disagree"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "strange": 1}))
    with pytest.raises(ArtefactError, match="strange"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_what_cannot_be_honoured_is_refused() -> None:
    model, ids = make(), tokens()
    with pytest.raises(NotServed, match="attn_layer_idx"):
        make(attn_layer_idx=[1])
    with pytest.raises(DataError, match="Mamba9"):
        make(ssm_cfg={"layer": "Mamba9"})
    with pytest.raises(NotServed, match="position_ids"):
        model(ids, position_ids=ids)
    with pytest.raises(NotServed, match="CUDA graphs"):
        model.generate(ids, max_length=12, cg=True)
    with pytest.raises(NotServed, match="min_p"):
        model.generate(ids, max_length=12, top_k=3, min_p=0.1)
