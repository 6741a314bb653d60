"""The Mamba-2 mixer: parameters as in the public checkpoints, precision, compilation, parity with transformers."""

import math

import pytest
import torch

from mambakit.nn import Backbone, Mamba2


def test_parameters_are_named_and_shaped_as_in_public_checkpoints() -> None:
    mixer = Mamba2(32, d_state=5, d_conv=3, headdim=16, n_groups=2)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "A_log": (4,),
        "D": (4,),
        "dt_bias": (4,),
        "in_proj.weight": (64 + (64 + 2 * 2 * 5) + 4, 32),  # z, then x, B and C, then dt
        "conv1d.weight": (84, 1, 3),
        "conv1d.bias": (84,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_initial_values_are_those_of_the_paper() -> None:
    mixer = Mamba2(512, headdim=2, D_has_hdim=True)  # 512 heads
    rates = mixer.A_log.exp()
    assert rates.min() >= 0.999
    assert rates.max() <= 16.001
    assert abs(rates.mean() - 8.5) < 0.5
    assert (mixer.D == 1).all()
    assert mixer.D.shape == (1024,)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.2  # log-uniform around the geometric mean
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.D, mixer.dt_bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": 24}, "headdim must divide expand"),
        ({"n_groups": 3}, "n_groups must divide the number of heads 4"),
        ({"A_init_range": (0.0, 16.0)}, "A_init_range must be an interval of positive numbers"),
        ({"rmsnorm": False, "norm_before_gate": True}, "norm_before_gate needs a norm"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(32, **{"headdim": 16, **change})


def test_steps_are_kept_within_dt_limit() -> None:
    mixer = Mamba2(8, headdim=4, d_state=4, dt_limit=(0.0, 0.0))
    x = torch.randn(1, 20, 8)
    _, state = mixer(x)
    assert (state.ssm == 0).all()


def test_chunk_size_does_not_change_the_result() -> None:
    mixer = Mamba2(8, headdim=4, d_state=4)
    x = torch.randn(1, 100, 8)
    expected = mixer(x)[0]
    mixer.chunk_size = 7
    torch.testing.assert_close(mixer(x)[0], expected)


def test_states_stay_float32_in_a_bfloat16_model() -> None:
    mixer = Mamba2(16, headdim=8, d_state=4, dtype=torch.bfloat16)
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == {"A_log", "D", "dt_bias"}
    y, state = mixer(torch.randn(1, 20, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert state.conv.dtype == torch.bfloat16


def test_step_is_the_layer_on_one_token() -> None:
    mixer = Mamba2(8, headdim=8, d_state=4)
    x = torch.randn(2, 3, 8)
    _, state = mixer(x[:, :2])
    y, after = mixer.step(x[:, 2], state)
    expected, expected_after = mixer(x[:, 2:], state)
    torch.testing.assert_close(y, expected[:, 0])
    torch.testing.assert_close(after.ssm, expected_after.ssm)


def test_compiled_whole_and_equal() -> None:
    backbone = Backbone(16, 1, "mamba2", {"d_state": 4, "headdim": 8})
    compiled = torch.compile(backbone, fullgraph=True)
    x = torch.randn(2, 20, 16)
    y, _ = backbone(x)
    grads = torch.autograd.grad(y.square().sum(), list(backbone.parameters()))
    y_compiled, state = compiled(x)
    torch.testing.assert_close(y_compiled, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y_compiled.square().sum(), list(backbone.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled(x, state)[0], backbone(x, state)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_equal_to_transformers_on_its_weights(n_groups: int) -> None:
    transformers = pytest.importorskip("transformers", reason="the [bench] extra is not installed")
    config = transformers.Mamba2Config(
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        vocab_size=10,
        head_dim=16,
        num_heads=4,
        n_groups=n_groups,
        chunk_size=16,
    )
    theirs = transformers.Mamba2Model(config).eval()
    options = {"d_state": 8, "headdim": 16, "n_groups": n_groups, "norm_eps": config.layer_norm_epsilon}
    ours = Backbone(32, 2, "mamba2", options, norm_eps=config.layer_norm_epsilon)
    ours.load_state_dict({name: p for name, p in theirs.state_dict().items() if "embeddings" not in name})
    hidden = torch.randn(2, 50, 32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=hidden, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours(hidden)[0], expected, rtol=1e-4, atol=1e-5)
