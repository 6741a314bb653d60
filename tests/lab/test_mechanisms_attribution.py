"""Attributions add up to the logit; lenses end in the model's own logits; language models are read like any other."""

import pytest
import torch
from tests.lab.mechanism_models import CASES, LENGTH, Classifier, backbone, shaken, tokens

from mambakit.errors import DataError
from mambakit.lab.mechanisms import (
    convolution_taps,
    delta_trace,
    fit_probe,
    logit_attribution,
    logit_lens,
    run_with_cache,
    source_attribution,
    tap_cosine,
)
from mambakit.lm import MambaConfig, MambaForCausalLM
from mambakit.nn import Backbone, Mamba2


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_the_stream_add_up_to_the_logit(case: str) -> None:
    model, inputs = Classifier(backbone(case)), tokens()
    logits = model(inputs)
    found = logit_attribution(model, inputs, torch.tensor([3, 8]))
    torch.testing.assert_close(found.total, logits[[0, 1], [3, 8]], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.values.sum(1), found.total, rtol=0, atol=1e-12)
    assert found.parts[0] == "embedded"
    assert len(found.parts) == 1 + 2 * 2 + 1
    assert (found.values.abs() > 1e-9).all()
    difference = logit_attribution(model, inputs, 3, against=5)
    torch.testing.assert_close(difference.total, logits[:, 3] - logits[:, 5], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", [-1, 3])
def test_the_sources_of_a_mixer_add_up_to_what_it_adds(case: str, position: int) -> None:
    model, inputs = Classifier(backbone(case)), tokens()
    whole = logit_attribution(model, inputs, 4, against=2, position=position)
    for layer in (0, 1):
        found = source_attribution(model, inputs, 4, layer, against=2, position=position)
        expected = whole.values[:, whole.parts.index(f"layers.{layer}.mixer.output")]
        torch.testing.assert_close(found.total, expected, rtol=0, atol=1e-10)
        assert found.parts == (*(str(j) for j in range(LENGTH)), "D", "bias")
        later = LENGTH if position == -1 else position + 1
        assert (found.values[:, later:LENGTH] == 0).all()  # nothing comes from what is to come
        assert (found.values[:, :later].abs() > 1e-12).all()


def test_attribution_of_a_source_is_what_its_removal_takes_away() -> None:
    """In the last layer, without an MLP, the logit at a frozen scale loses exactly that much."""
    model, inputs = Classifier(backbone("mamba", layers=1, mlp=0)), tokens(batch=1)
    with torch.no_grad():
        cache = run_with_cache(model, inputs, ["layers.0.*", "layers.0.mixer.mixing", "final"])[1]
        stream = cache["layers.0.residual"][0, -1]
        scale = torch.rsqrt(stream.square().mean() + 1e-5)
        mixer = model.stack.layers[0].mixer
        M, x, z = (cache[f"layers.0.mixer.{name}"][0] for name in ("mixing", "x", "z"))
        lost = mixer.out_proj.weight @ (M[:, -1, 2] * x[2] * torch.nn.functional.silu(z[-1]))
        expected = model.lm_head.weight[6] @ (model.stack.norm_f.weight * lost * scale)
    found = source_attribution(model, inputs, 6, 0)
    torch.testing.assert_close(found.values[0, 2], expected, rtol=0, atol=1e-10)


def test_what_cannot_be_attributed_is_refused() -> None:
    model, inputs = Classifier(backbone("mamba")), tokens()
    with pytest.raises(DataError, match="target must be from 0 to 10"):
        logit_attribution(model, inputs, 11)
    with pytest.raises(DataError, match="position must be within 7 positions, got 7"):
        logit_attribution(model, inputs, 1, position=7)
    with pytest.raises(DataError, match="from 0 to 1, got 2"):
        source_attribution(model, inputs, 1, 2)
    with pytest.raises(DataError, match=r"has no nn\.Linear by the name"):
        logit_attribution(model.stack, torch.randn(1, 3, 8, dtype=torch.float64), 0)
    model.stack.layers[1].mixer.out_proj = torch.nn.Sequential(model.stack.layers[1].mixer.out_proj)
    with pytest.raises(DataError, match="out_proj of layer 1 is a Sequential"):
        source_attribution(model, inputs, 1, 1)
    dropping = Classifier(Backbone(8, 1, dropout=0.5, dtype=torch.float64))
    with pytest.raises(DataError, match="dropout is at work"):
        logit_attribution(dropping.train(), inputs, 0)
    assert logit_attribution(dropping.eval(), inputs, 0).total.shape == (2,)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_a_language_model_is_looked_into_as_it_is(mixer: str) -> None:
    options = {} if mixer == "mamba" else {"headdim": 8}
    config = MambaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, mixer=mixer, mixer_options={"d_state": 4, **options}
    )
    model = shaken(MambaForCausalLM(config).eval())
    inputs = torch.randint(20, (2, 9))
    expected = model(inputs).logits
    output, cache = run_with_cache(model, inputs, "layers.*.mixer.states")
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.by_layer("mixer.states").keys() == {0, 1}
    found = logit_attribution(model, inputs, 7, position=4)
    torch.testing.assert_close(found.total, expected[:, 4, 7], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logit_lens(model, inputs)[-1], expected, rtol=1e-4, atol=1e-4)
    padding = torch.ones_like(inputs)
    padding[0, :3] = 0
    for look in (logit_lens, lambda *given, **options: logit_attribution(*given, 7, **options)):
        with pytest.raises(DataError, match="without an attention_mask"):
            look(model, inputs, attention_mask=padding)


def test_the_lens_of_a_layer_is_the_model_cut_after_it() -> None:
    model, inputs = Classifier(backbone("mamba3", layers=3)), tokens()
    lens = logit_lens(model, inputs)
    assert lens.shape == (4, 2, LENGTH, 11)
    for layers in range(4):
        cut = Classifier(backbone("mamba3", layers=3))
        cut.load_state_dict(model.state_dict())
        cut.stack.layers = cut.stack.layers[:layers] if layers else cut.stack.layers
        if layers:
            torch.testing.assert_close(lens[layers][:, -1], cut(inputs), rtol=0, atol=1e-10)
        else:
            bare = cut.lm_head(cut.stack.norm_f(cut.embedding(inputs)))
            torch.testing.assert_close(lens[0], bare, rtol=0, atol=1e-10)


def test_delta_traces_are_the_steps_after_softplus() -> None:
    model, inputs = Classifier(backbone("mamba2")), tokens()
    traces = delta_trace(model, inputs)
    assert {layer: tuple(trace.shape) for layer, trace in traces.items()} == {0: (2, LENGTH, 4), 1: (2, LENGTH, 4)}
    mixer, x = model.stack.layers[0].mixer, model.stack.layers[0].norm(model.embedding(inputs))
    dt = mixer.in_proj(x)[..., -4:]
    torch.testing.assert_close(traces[0], torch.nn.functional.softplus(dt + mixer.dt_bias), rtol=0, atol=1e-12)


def test_taps_of_a_convolution_of_ones_all_point_one_way() -> None:
    model = backbone("mamba2")
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Mamba2)
    taps = convolution_taps(model)[0]
    assert taps.shape == (28, 4)
    parts = [convolution_taps(model, part)[0] for part in ("x", "B", "C")]
    torch.testing.assert_close(torch.cat(parts), taps, rtol=0, atol=0)
    cosine = tap_cosine(model)[0]
    torch.testing.assert_close(cosine[1, 3], torch.cosine_similarity(taps[:, 1], taps[:, 3], dim=0))
    with torch.no_grad():
        mixer.conv1d.weight.fill_(1.0)
    torch.testing.assert_close(tap_cosine(model)[0], torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(DataError, match="no layer of this model has a convolution"):
        convolution_taps(backbone("mamba3"))
    with pytest.raises(DataError, match="part must be one of x, B, C"):
        convolution_taps(model, "z")


def test_a_probe_reads_from_the_state_which_token_went_by() -> None:
    model = Classifier(backbone("mamba2", layers=1))
    inputs = tokens(batch=1000, length=4)
    _, cache = run_with_cache(model, inputs, "layers.0.mixer.states")
    states, seen = cache["layers.0.mixer.states"][:, -1], inputs[:, 1]
    probe = fit_probe(states[:800], seen[:800])
    assert probe.score(states[800:], seen[800:]) > 0.4  # by chance 1 / 11
    assert fit_probe(states[:800], seen[torch.randperm(1000)][:800]).score(states[800:], seen[800:]) < 0.25


@pytest.mark.parametrize(("examples", "features"), [(40, 5), (5, 40)])
def test_a_probe_is_the_ridge_regression_of_its_closed_form(examples: int, features: int) -> None:
    X, Y = torch.randn(examples, features).double(), torch.randn(examples, 2).double()
    probe = fit_probe(X, Y, ridge=0.1)
    Z = (X - X.mean(0)) / X.std(0)
    inverse = torch.linalg.inv(Z.mT @ Z + 0.1 * examples * torch.eye(features, dtype=torch.float64))
    expected = Z @ inverse @ Z.mT @ (Y - Y.mean(0)) + Y.mean(0)
    torch.testing.assert_close(probe.predict(X), expected, rtol=0, atol=1e-9)
    assert 0.0 < probe.score(X, Y) < 1.0


def test_probes_refuse_what_they_cannot_fit() -> None:
    with pytest.raises(DataError, match="two examples or more"):
        fit_probe(torch.randn(3, 2), torch.randn(4))
    with pytest.raises(DataError, match="not negative"):
        fit_probe(torch.randn(3, 2), torch.tensor([0, -100, 1]))
    with pytest.raises(DataError, match="ridge must be positive"):
        fit_probe(torch.randn(3, 2), torch.randn(3), ridge=0.0)
    with pytest.raises(DataError, match="must be finite"):
        fit_probe(torch.full((3, 2), torch.nan), torch.randn(3))
