"""The Mamba-1 mixer: parameters as in the public checkpoints, precision, compilation, parity with transformers."""

import math

import pytest
import torch

from mambakit.nn import Backbone, Mamba


def test_parameters_are_named_and_shaped_as_in_public_checkpoints() -> None:
    shapes = {name: tuple(p.shape) for name, p in Mamba(32, d_state=5, d_conv=3).named_parameters()}
    assert shapes == {
        "A_log": (64, 5),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 3),
        "conv1d.bias": (64,),
        "x_proj.weight": (12, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_initial_values_are_those_of_the_paper() -> None:
    mixer = Mamba(256, d_state=4)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5.0).expand(512, 4))
    assert (mixer.D == 1).all()
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.2  # log-uniform around the geometric mean
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias))


def test_backbone_scales_the_residual_projections_by_the_depth() -> None:
    torch.manual_seed(0)
    one = Backbone(32, 1).layers[0].mixer.out_proj.weight
    torch.manual_seed(0)
    four = Backbone(32, 4).layers[0].mixer.out_proj.weight
    torch.testing.assert_close(one, four * 2)


def test_an_unknown_mixer_or_a_state_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="mixer must be one of"):
        Backbone(8, 1, "rwkv")
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="one entry for each of 2 layers"):
        Backbone(8, 2)(x, Backbone(8, 1)(x)[1])
    with pytest.raises(ValueError, match="dt_rank must be a number or 'auto'"):
        Mamba(8, dt_rank="full")


def test_residuals_and_states_stay_float32_under_autocast() -> None:
    backbone = Backbone(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        block_out, state = backbone.layers[0](torch.randn(1, 20, 16))
    assert block_out.dtype == torch.float32
    assert state.ssm.dtype == torch.float32
    assert state.conv.dtype == torch.bfloat16


def test_step_is_the_layer_on_one_token() -> None:
    mixer = Mamba(8)
    x = torch.randn(2, 3, 8)
    _, state = mixer(x[:, :2])
    y, after = mixer.step(x[:, 2], state)
    expected, expected_after = mixer(x[:, 2:], state)
    torch.testing.assert_close(y, expected[:, 0])
    torch.testing.assert_close(after.ssm, expected_after.ssm)


def test_compiled_whole_and_equal() -> None:
    backbone = Backbone(16, 1, mixer_options={"d_state": 4})
    compiled = torch.compile(backbone, fullgraph=True)
    x = torch.randn(2, 20, 16)
    y, _ = backbone(x)
    grads = torch.autograd.grad(y.square().sum(), list(backbone.parameters()))
    y_compiled, state = compiled(x)
    torch.testing.assert_close(y_compiled, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y_compiled.square().sum(), list(backbone.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled(x, state)[0], backbone(x, state)[0], rtol=1e-4, atol=1e-5)


def test_equal_to_transformers_on_its_weights() -> None:
    transformers = pytest.importorskip("transformers", reason="the [bench] extra is not installed")
    config = transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=10)
    theirs = transformers.MambaModel(config).eval()
    ours = Backbone(32, 2, mixer_options={"d_state": 8}, norm_eps=config.layer_norm_epsilon)
    ours.load_state_dict({name: p for name, p in theirs.state_dict().items() if "embeddings" not in name})
    hidden = torch.randn(2, 50, 32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=hidden, use_cache=False).last_hidden_state
    got, _ = ours(hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
