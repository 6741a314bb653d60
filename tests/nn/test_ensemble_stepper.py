"""Several models in one call say what they say one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from mambakit.nn import Backbone, EnsembleStepper
from mambakit.nn.native_stack import refusal

STACKS = {
    "mamba": lambda width: Backbone(width, 2, "mamba", {"d_state": 5}),
    "mamba2": lambda width: Backbone(width, 2, "mamba2", {"d_state": 8, "headdim": 8}),
    "mamba3": lambda width: Backbone(width, 2, "mamba3", {"d_state": 8, "headdim": 8}),
    "with an mlp": lambda width: Backbone(width, 2, "mamba", d_intermediate=24),
    "s4d": lambda width: Backbone(width, 2, "s4d", {"d_state": 8}),
    "gru": lambda width: nn.GRU(width, width, batch_first=True),
}
COMPILED = ("mamba", "mamba2", "mamba3", "with an mlp")


def make(name, count=3, inputs=7, outputs=5, width=16):
    return [(nn.Linear(inputs, width), STACKS[name](width), nn.Linear(width, outputs)) for _ in range(count)]


@torch.no_grad()
def whole(models, x):
    """Of a whole sequence x (steps, inputs)."""
    each = [head(stack(embed(torch.from_numpy(x)[None]))[0])[0] for embed, stack, head in models]
    return torch.stack(each).mean(dim=0).numpy()


def steps(stepper, x):
    return np.stack([stepper(row) for row in x])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", STACKS)
def test_steps_are_the_mean_of_the_models_on_the_whole_sequence(name, count):
    models = make(name, count)
    x = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    stepper = EnsembleStepper(models)
    np.testing.assert_allclose(steps(stepper, x), whole(models, x), atol=2e-6)
    stepper.reset()
    np.testing.assert_allclose(steps(stepper, x), whole(models, x), atol=2e-6)


@pytest.mark.parametrize("name", STACKS)
def test_the_compiled_stack_takes_the_steps_where_it_can_and_says_why_not(name):
    stepper = EnsembleStepper(make(name))
    if name in COMPILED and not refusal(STACKS[name](16)):
        assert (stepper.backend, stepper.reason) == ("cpu", "")
    else:
        assert stepper.backend == "layers"
        assert stepper.reason


def test_models_may_differ_in_width_and_kind():
    models = [*make("mamba", 1, width=16), *make("mamba2", 1, width=24)]
    x = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    np.testing.assert_allclose(steps(EnsembleStepper(models), x), whole(models, x), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_as_they_are(dtype):
    models = [tuple(part.to(dtype) for part in model) for model in make("mamba")]
    x = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    found = steps(EnsembleStepper(models), x)
    exact = whole([tuple(part.float() for part in model) for model in models], x)
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_linear_layers_without_biases_have_none():
    models = [(nn.Linear(7, 16, bias=False), STACKS["mamba"](16), nn.Linear(16, 5, bias=False))]
    x = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    np.testing.assert_allclose(steps(EnsembleStepper(models), x), whole(models, x), atol=2e-6)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
def test_results_do_not_depend_on_the_number_of_threads(name):
    x = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32)
    models = make(name, width=128, inputs=7)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(steps(EnsembleStepper(models), x))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


def test_changed_weights_take_effect_at_the_next_step():
    models = make("mamba", 1)
    stepper = EnsembleStepper(models)
    x = np.ones(7, dtype=np.float32)
    stepper(x)
    with torch.no_grad():
        models[0][2].weight.zero_()
        models[0][2].bias.fill_(3.0)
    assert stepper(x).tolist() == [3.0] * 5


def test_what_was_returned_is_the_callers_own():
    stepper = EnsembleStepper(make("mamba"))
    first = stepper(np.ones(7, dtype=np.float32))
    copy = first.copy()
    stepper(np.zeros(7, dtype=np.float32))
    assert np.array_equal(first, copy)


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"\(inputs,\) = \(7,\), got \(6,\)"):
        EnsembleStepper(make("mamba"))(np.zeros(6, dtype=np.float32))


def test_no_models_and_models_that_disagree_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        EnsembleStepper([])
    with pytest.raises(ValueError, match="agree in inputs and outputs"):
        EnsembleStepper([*make("mamba", 1), *make("mamba", 1, outputs=4)])
