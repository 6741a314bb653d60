"""Steps of a whole stack in one call: equal to the layers' own, and interchangeable with them at any point."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn import Backbone, Bidirectional, Block, Mamba, Mamba2, Mamba3, Stepper, native_stack
from mambakit.ops import cpu

BOUND = 1e-5  # ratio of norms, float32
WIDTH = 13  # no multiple of anything

needs_cpu = pytest.mark.skipif(not cpu.AVAILABLE, reason="the extension is not built")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba, odd sizes": ("mamba", {"d_state": 5, "d_conv": 3, "dt_rank": 3, "conv_bias": False, "bias": True}),
    "mamba, one tap": ("mamba", {"d_state": 37, "d_conv": 1, "expand": 3}),
    "mamba2": ("mamba2", {"headdim": 13, "d_state": 11}),
    "mamba2, groups": ("mamba2", {"headdim": 2, "n_groups": 13, "d_state": 34, "norm_before_gate": True}),
    "mamba2, no norm": ("mamba2", {"headdim": 1, "rmsnorm": False, "dt_limit": (0.01, 0.05), "bias": True}),
    "mamba2, D a channel": ("mamba2", {"headdim": 26, "D_has_hdim": True, "d_conv": 2, "conv_bias": False}),
    "mamba3": ("mamba3", {"headdim": 13, "d_state": 22}),
    "mamba3, groups": ("mamba3", {"headdim": 2, "n_groups": 13, "d_state": 6, "rope_fraction": 1}),
    "mamba3, rational": ("mamba3", {"headdim": 26, "d_state": 36, "A_activation": "rational", "output_norm": True}),
    "mamba3, MIMO": ("mamba3", {"headdim": 13, "d_state": 22, "mimo_rank": 3}),
    "mamba3, MIMO, norm": (
        "mamba3",
        {"headdim": 2, "d_state": 20, "mimo_rank": 2, "output_norm": True, "n_groups": 13},
    ),
}


def perturbed(layer: nn.Module) -> nn.Module:
    """`layer` with every parameter moved off its initial value, biases of zero and weights of one among them."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def backbone(name: str, n_layer: int = 2, **options: Any) -> Backbone:
    mixer, mixer_options = OPTIONS[name]
    return perturbed(Backbone(WIDTH, n_layer, mixer, mixer_options, **options))


def run(stepper: Stepper, x: Tensor) -> Tensor:
    return torch.stack([stepper(row) for row in x.unbind(1)], dim=1)


def assert_near(got: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert difference <= bound, f"{difference:.1e}"


def assert_same_state(got: Any, expected: Any) -> None:
    assert [type(part) for part in got] == [type(part) for part in expected]
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert_near(a, b)


# Equal to the layers.


@needs_cpu
@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_steps_give_what_the_whole_sequence_gives(name: str, batch: int) -> None:
    layer, x = backbone(name), torch.randn(batch, 7, WIDTH)
    stepper = Stepper(layer, batch)
    assert (stepper.backend, stepper.reason) == ("cpu", "")
    with torch.no_grad():
        expected, state = layer(x)
    assert_near(run(stepper, x), expected)
    assert_same_state(stepper.state, state)


@needs_cpu
@settings(max_examples=40)
@given(
    kind=st.sampled_from(["mamba", "mamba2", "mamba3"]),
    d_model=st.integers(1, 40),
    n_layer=st.integers(1, 3),
    batch=st.integers(1, 5),
    d_state=st.integers(1, 20),
    heads=st.integers(1, 4),
    rank=st.integers(1, 3),
    d_intermediate=st.sampled_from([0, 9]),
    seed=st.integers(0, 99),
)
def test_cpu_steps_of_any_sizes_are_the_layers_steps(
    kind: str,
    d_model: int,
    n_layer: int,
    batch: int,
    d_state: int,
    heads: int,
    rank: int,
    d_intermediate: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"d_state": d_state}
    if kind != "mamba":
        options |= {"headdim": d_model, "expand": heads, "n_groups": heads}
    if kind == "mamba3":
        options |= {"d_state": 4 * d_state, "mimo_rank": rank}
    layer = perturbed(Backbone(d_model, n_layer, kind, options, d_intermediate=d_intermediate))
    x = torch.randn(batch, 3, d_model)
    stepper = Stepper(layer, batch)
    with torch.no_grad():
        expected, state = layer(x)
    assert_near(run(stepper, x), expected)
    assert_same_state(stepper.state, state)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_steps_of_narrow_weights_are_those_of_the_same_weights_in_float32(name: str, dtype: torch.dtype) -> None:
    narrow = backbone(name, d_intermediate=9).to(dtype)
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(run(Stepper(narrow, 2), x), run(Stepper(copy.deepcopy(narrow).float(), 2), x))


@needs_cpu
@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
def test_cpu_steps_of_bfloat16_layers_are_near_their_own(name: str) -> None:
    mixer, options = OPTIONS[name]
    layer = Backbone(WIDTH, 2, mixer, options, dtype=torch.bfloat16)
    x = torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        expected, _ = layer(x)
    y = run(Stepper(layer), x)
    assert y.dtype == torch.float32
    assert_near(y, expected, bound=2e-2)


@needs_cpu
def test_cpu_steps_a_hybrid_of_its_mixers() -> None:
    options = {"mamba2": OPTIONS["mamba2"][1], "mamba3": OPTIONS["mamba3"][1]}
    layer = perturbed(Backbone(WIDTH, 3, ["mamba2", "mamba", "mamba3"], options))
    x = torch.randn(2, 6, WIDTH)
    stepper = Stepper(layer, 2)
    assert stepper.backend == "cpu"
    assert_near(run(stepper, x), layer(x)[0].detach())


@needs_cpu
@pytest.mark.parametrize("mixer", [Mamba, Mamba2, Mamba3])
@pytest.mark.parametrize("in_block", [False, True])
def test_cpu_steps_a_mixer_or_a_block_alone(mixer: type[nn.Module], in_block: bool) -> None:
    alone = mixer(16, headdim=16) if mixer is not Mamba else mixer(16)
    layer = Block(alone, 16) if in_block else alone
    x = torch.randn(2, 4, 16)
    stepper = Stepper(layer, 2)
    with torch.no_grad():
        expected, state = layer(x)
    assert stepper.backend == "cpu"
    assert_near(run(stepper, x), expected)
    assert_same_state(stepper.state, state)


@needs_cpu
def test_cpu_takes_large_inputs_to_the_limits_of_softplus_and_sigmoid() -> None:
    for name in ("mamba", "mamba2", "mamba3"):
        layer, x = backbone(name, n_layer=1), 1e4 * torch.randn(1, 3, WIDTH)
        mixer = layer.layers[0].mixer
        with torch.no_grad():
            expected, _ = mixer(x)
        assert_near(run(Stepper(mixer), x), expected, bound=1e-4)


# One result whatever runs it.


@needs_cpu
@pytest.mark.parametrize("name", OPTIONS)
def test_cpu_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    layer = backbone(name, d_intermediate=9)
    x = torch.randn(2, WIDTH)
    initial = Stepper(layer, 2).state
    one, two, three = (step_by_a_team_of(threads, layer, initial, x) for threads in (1, 2, 3))
    for a, b, c in zip(tree_leaves(one), tree_leaves(two), tree_leaves(three), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def step_by_a_team_of(threads: int, layer: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Any]:
    """One step by exactly so many threads; a stepper would take one for layers as small as these."""
    y, state = torch.empty_like(x), tree_map(torch.clone, state)
    native_stack.build(layer, state, x, y).step_with(threads)
    return y, state


@needs_cpu
@pytest.mark.parametrize("name", ["mamba, odd sizes", "mamba2, groups", "mamba3, MIMO"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees(name: str, dtype: torch.dtype) -> None:
    layer, x = backbone(name).to(dtype).float(), torch.randn(3, 4, WIDTH)
    with torch.no_grad():
        expected, _ = layer(x)
    layer.to(dtype)
    before = cpu.native.instruction_set()
    try:
        for isa in cpu.native.instruction_sets():
            cpu.native.use_instruction_set(isa)
            assert_near(run(Stepper(layer, 3), x), expected)
    finally:
        cpu.native.use_instruction_set(before)


# The state, whichever backend steps.


@pytest.fixture(params=["cpu", "layers"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "layers":
        monkeypatch.setenv("MAMBAKIT_BACKEND", "portable")
    elif not cpu.AVAILABLE:
        pytest.skip("the extension is not built")
    return request.param


@pytest.fixture(params=["mamba, odd sizes", "mamba2, groups", "mamba3, MIMO"])
def layer(request: pytest.FixtureRequest) -> Backbone:
    return backbone(request.param)


def test_steps_carry_on_from_a_sequence_read_at_once(layer: Backbone, backend: str) -> None:
    x = torch.randn(2, 9, WIDTH)
    stepper = Stepper(layer, 2)
    assert stepper.backend == backend
    assert bool(stepper.reason) == (backend == "layers")
    with torch.no_grad():
        expected, _ = layer(x)
        _, state = layer(x[:, :5])
    stepper.load(state)
    assert_near(run(stepper, x[:, 5:]), expected[:, 5:])


def test_the_layer_carries_on_from_steps(layer: Backbone, backend: str) -> None:
    x = torch.randn(2, 9, WIDTH)
    stepper = Stepper(layer, 2)
    run(stepper, x[:, :4])
    with torch.no_grad():
        expected, expected_state = layer(x)
        y, state = layer(x[:, 4:], stepper.state)
    assert_near(y, expected[:, 4:])
    assert_same_state(state, expected_state)


def test_reset_starts_afresh(layer: Backbone, backend: str) -> None:
    x = torch.randn(1, 3, WIDTH)
    stepper = Stepper(layer)
    first = run(stepper, x)
    assert not torch.equal(run(stepper, x), first)
    stepper.reset()
    assert torch.equal(run(stepper, x), first)


def test_a_state_that_was_read_is_not_changed_by_later_steps(layer: Backbone, backend: str) -> None:
    stepper = Stepper(layer)
    run(stepper, torch.randn(1, 2, WIDTH))
    state = stepper.state
    kept = tree_map(torch.clone, state)
    run(stepper, torch.randn(1, 2, WIDTH))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(kept), strict=True))


def test_a_loaded_state_is_not_changed_by_steps(layer: Backbone, backend: str) -> None:
    with torch.no_grad():
        _, state = layer(torch.randn(1, 3, WIDTH))
    kept = tree_map(torch.clone, state)
    stepper = Stepper(layer)
    stepper.load(state)
    run(stepper, torch.randn(1, 2, WIDTH))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(kept), strict=True))


def test_a_fork_goes_its_own_way_from_the_same_state(layer: Backbone, backend: str) -> None:
    x = torch.randn(1, 6, WIDTH)
    stepper = Stepper(layer)
    run(stepper, x[:, :3])
    fork = stepper.fork()
    onward = run(stepper, x[:, 3:])
    assert torch.equal(run(fork, x[:, 3:]), onward)
    fork.reset()
    assert not torch.equal(fork.state[0][-1], stepper.state[0][-1])


def test_outputs_of_earlier_steps_stay_as_they_are(layer: Backbone, backend: str) -> None:
    stepper = Stepper(layer)
    y = stepper(torch.randn(1, WIDTH))
    kept = y.clone()
    stepper(torch.randn(1, WIDTH))
    assert torch.equal(y, kept)


# Parameters are read where they are.


def test_parameters_changed_in_place_take_effect_at_the_next_step(layer: Backbone, backend: str) -> None:
    assert_follows(layer, lambda: perturbed(layer))


def test_replaced_parameters_take_effect_at_the_next_step(layer: Backbone, backend: str) -> None:
    weights = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    assert_follows(layer, lambda: layer.load_state_dict(weights, assign=True))


def test_parameters_of_another_dtype_take_effect_at_the_next_step(layer: Backbone, backend: str) -> None:
    assert_follows(layer, lambda: layer.to(torch.bfloat16), bound=2e-2)


def assert_follows(layer: Backbone, change: Any, bound: float = BOUND) -> None:
    """A stepper made before `change` of the layer steps as the layer does after it, and from the same state."""
    x = torch.randn(2, 5, WIDTH)
    stepper = Stepper(layer, 2)
    before = run(stepper, x[:, :3])
    state = stepper.state
    change()
    with torch.no_grad():
        expected, _ = layer(x[:, 3:], state)
    after = run(stepper, x[:, 3:])
    assert_near(after, expected, bound)
    assert not torch.equal(before[:, :2], after)


def test_parameters_of_other_sizes_are_refused_before_they_are_read(backend: str) -> None:
    layer = backbone("mamba")
    stepper = Stepper(layer)
    layer.layers[0].mixer.A_log = nn.Parameter(torch.zeros(26, 40))
    with pytest.raises(ValueError, match="must have shape"):
        stepper(torch.randn(1, WIDTH))


@needs_cpu
def test_cpu_hands_over_to_the_layers_when_the_weights_become_float64(layer: Backbone) -> None:
    x = torch.randn(1, 4, WIDTH)
    stepper = Stepper(layer)
    run(stepper, x[:, :2])
    layer.double()
    y = run(stepper, x[:, 2:])
    assert stepper.backend == "layers"
    assert y.dtype == torch.float64
    assert_near(y, layer(x)[0][:, 2:])


# What it refuses, and what it leaves to the layers.


@pytest.mark.parametrize("mixer", ["s4d", "attention"])
def test_layers_step_what_the_compiled_stack_does_not_know(mixer: str) -> None:
    layer = Backbone(12, 2, ["mamba", mixer], {"attention": {"n_heads": 2}} if mixer == "attention" else None)
    x = torch.randn(2, 6, 12)
    stepper = Stepper(layer, 2)
    assert stepper.backend == "layers"
    with torch.no_grad():
        expected, state = layer(x)
        _, prefix = layer(x[:, :3])
    assert_near(run(stepper, x), expected)
    stepper.load(prefix)
    assert_near(run(stepper, x[:, 3:]), expected[:, 3:])
    stepper.load(state)


@needs_cpu
def test_a_module_put_in_place_of_a_known_one_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = backbone("mamba")
    layer.layers[0].mixer.out_proj = Doubled(26, WIDTH, bias=False)
    stepper = Stepper(layer)
    assert stepper.backend == "layers"
    assert "Doubled" in stepper.reason


@needs_cpu
def test_hooks_are_called() -> None:
    layer, calls = backbone("mamba"), []
    layer.layers[1].register_forward_hook(lambda *_: calls.append(1))
    stepper = Stepper(layer)
    calls.clear()
    stepper(torch.randn(1, WIDTH))
    assert calls == [1]
    assert "hooks" in stepper.reason


def test_wrong_inputs_and_states_are_refused(layer: Backbone, backend: str) -> None:
    stepper = Stepper(layer, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(batch_size, d_model\) = \(2, 13\), got \(1, 13\)"):
        stepper(torch.randn(1, WIDTH))
    with pytest.raises(ValueError, match="x requires a gradient"):
        stepper(torch.randn(2, WIDTH, requires_grad=True))
    with pytest.raises(ValueError, match="must have shape"):
        stepper.load(Stepper(layer, 3).state)
    with pytest.raises(ValueError, match="state must have the form"):
        stepper.load(stepper.state[:1])


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="layer must be a Backbone, a Block"):
        Stepper(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Stepper(Mamba(8), 0)
    with pytest.raises(ValueError, match="no state to carry on from"):
        Stepper(Block(Bidirectional(Mamba(8), Mamba(8)), 8))


def test_steps_record_no_gradients(layer: Backbone, backend: str) -> None:
    stepper = Stepper(layer)
    assert not stepper(torch.randn(1, WIDTH)).requires_grad
    with torch.no_grad():
        assert not stepper(torch.randn(1, WIDTH, requires_grad=True)).requires_grad
    assert not any(part.requires_grad for part in tree_leaves(stepper.state))


def test_a_stepper_serves_inside_and_outside_of_inference_mode(layer: Backbone, backend: str) -> None:
    with torch.inference_mode():
        stepper = Stepper(layer)
        stepper(torch.randn(1, WIDTH))
    state = stepper.state
    stepper(torch.randn(1, WIDTH))
    stepper.load(state)


def test_falcon_mambas_norms_and_active_dropout_are_left_to_the_layers() -> None:
    normed = Backbone(16, 1, mixer_options={"d_state": 4, "b_c_dt_rms_eps": 1e-6}).eval()
    assert "b_c_dt_rms_eps" in Stepper(normed).reason
    x = torch.randn(1, 5, 16)
    stepper = Stepper(normed)
    steps = torch.stack([stepper(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(steps, normed(x)[0])
    dropping = Backbone(16, 1, dropout=0.5)
    assert "dropout is active" in Stepper(dropping).reason
    assert "dropout" not in Stepper(dropping.eval()).reason
    assert not torch.equal(dropping.train()(x)[0], dropping(x)[0])
