"""mamba_ssm's mixers: their parameters and defaults, their states in place, and what they compute."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tests.compat import definitions
from tests.compat.agreement import assert_same
from tests.compat.test_scans import inner_definition
from torch import Tensor, nn

from mambakit.compat import NotServed
from mambakit.compat.inference import InferenceParams
from mambakit.compat.mamba1 import Mamba
from mambakit.compat.mamba2 import Mamba2
from mambakit.compat.mamba3 import Mamba3
from mambakit.errors import DataError

BATCH, LENGTH, WIDTH = 2, 9, 8
DOUBLE = {"dtype": torch.float64, "layer_idx": 0}

# Every kind of each mixer, and sizes that make none of its axes equal.
MIXERS = {
    "Mamba": functools.partial(Mamba, WIDTH, d_state=4, **DOUBLE),
    "Mamba with biases": functools.partial(Mamba, WIDTH, d_state=4, bias=True, d_conv=3, **DOUBLE),
    "Mamba2": functools.partial(Mamba2, WIDTH, d_state=6, headdim=4, ngroups=2, **DOUBLE),
    "Mamba2 beside an MLP": functools.partial(
        Mamba2, WIDTH, d_state=6, headdim=4, d_ssm=12, D_has_hdim=True, dt_limit=(0.01, 0.05), bias=True, **DOUBLE
    ),
    "Mamba2 without a norm": functools.partial(Mamba2, WIDTH, d_state=6, headdim=4, rmsnorm=False, **DOUBLE),
    "Mamba2 that gates after the norm": functools.partial(
        Mamba2, WIDTH, d_state=6, headdim=4, norm_before_gate=True, conv_init=0.5, **DOUBLE
    ),
    "Mamba3": functools.partial(Mamba3, WIDTH, d_state=8, headdim=4, **DOUBLE),
    "Mamba3 of several inputs": functools.partial(
        Mamba3, WIDTH, d_state=8, headdim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True, **DOUBLE
    ),
}


def disturbed(mixer: nn.Module) -> nn.Module:
    """With parameters that are nowhere equal, so that none can stand for another."""
    for weight in mixer.parameters():
        nn.init.normal_(weight, std=0.5)
    return mixer


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> nn.Module:
    return disturbed(MIXERS[request.param]())


def sequence(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def test_a_prompt_and_steps_give_what_the_whole_sequence_gives(mixer: nn.Module) -> None:
    x = sequence()
    whole = mixer(x)
    params = InferenceParams(LENGTH, BATCH)
    begin, pieces = 0, []
    for length in (4, 1, 1, 2, 1):  # several at a time too, which mamba_ssm refuses
        pieces.append(mixer(x[:, begin : begin + length], inference_params=params))
        params.seqlen_offset = begin = begin + length
    assert_same(torch.cat(pieces, 1), whole)


def test_states_are_updated_in_place_where_they_were_allocated(mixer: nn.Module) -> None:
    allocated = mixer.allocate_inference_cache(BATCH, LENGTH)
    places = [state.data_ptr() for state in allocated]
    params = InferenceParams(LENGTH, BATCH, key_value_memory_dict={0: allocated})
    mixer(sequence(), inference_params=params)
    assert [state.data_ptr() for state in params.key_value_memory_dict[0]] == places
    assert all(state.any() for state in allocated)


def test_a_prompt_starts_afresh_whatever_the_states_hold(mixer: nn.Module) -> None:
    x = sequence()
    params = InferenceParams(LENGTH, BATCH)
    first = mixer(x, inference_params=params)
    again = mixer(x, inference_params=params)
    assert torch.equal(first, again)


def test_gradients_reach_every_parameter(mixer: nn.Module) -> None:
    mixer(sequence()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in mixer.parameters())


def test_states_of_another_batch_are_refused(mixer: nn.Module) -> None:
    params = InferenceParams(LENGTH, BATCH)
    mixer(sequence(), inference_params=params)
    with pytest.raises(DataError, match="a batch of 2, got one of 3"):
        mixer(sequence(batch=3), inference_params=params)


@pytest.mark.parametrize("kind", [Mamba, Mamba2, functools.partial(Mamba3, d_state=16)])
def test_states_need_the_number_of_the_layer(kind) -> None:
    with pytest.raises(DataError, match="layer_idx"):
        kind(64)(torch.randn(1, 2, 64), inference_params=InferenceParams(2, 1))


@pytest.mark.parametrize("length", [2, LENGTH])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_the_state_of_the_convolution_is_its_last_inputs(name: str, length: int) -> None:
    mixer, x = disturbed(MIXERS[name]()), sequence(length=length)
    params = InferenceParams(LENGTH, BATCH)
    for t in range(length):
        mixer(x[:, t : t + 1], inference_params=params)
        params.seqlen_offset += 1
    by_steps = params.key_value_memory_dict[0][0]
    params.seqlen_offset = 0
    projected = mixer.in_proj(x)
    inputs = projected[..., :16] if name == "Mamba" else projected[..., 16 : 16 + mixer.conv1d.weight.shape[0]]
    expected = F.pad(inputs.mT, (4, 0))[..., -4:]
    assert_same(by_steps, expected)
    mixer(x, inference_params=params)
    assert_same(params.key_value_memory_dict[0][0], expected)


def test_mamba_1_is_its_definition() -> None:
    mixer, x = disturbed(MIXERS["Mamba with biases"]()), sequence()
    expected = inner_definition(
        mixer.in_proj(x).mT,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
        -mixer.A_log.exp(),
        mixer.D,
        mixer.dt_proj.bias,
    )
    assert_same(mixer(x), expected)


@pytest.mark.parametrize("name", [name for name in MIXERS if name.startswith("Mamba2")])
def test_mamba_2_is_its_definition(name: str) -> None:
    mixer, x = disturbed(MIXERS[name]()), sequence()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    dim, shared = mixer.d_ssm, mixer.ngroups * mixer.d_state
    mlp = mixer.d_inner - dim
    widths = [mlp, mlp, dim, dim + 2 * shared, mixer.nheads]
    gate, passed, z, xBC, dt = mixer.in_proj(x).split(widths, dim=-1)
    taps, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    xBC = definitions.convolution(xBC.mT, taps, bias, seq_idx, activation="silu").mT
    u, B, C = (
        t.unflatten(-1, (n, -1))
        for t, n in zip(xBC.split([dim, shared, shared], -1), (mixer.nheads, mixer.ngroups, mixer.ngroups), strict=True)
    )
    D = mixer.D.unflatten(0, (mixer.nheads, -1)) if mixer.D_has_hdim else mixer.D
    y, _ = definitions.chunk_scan(
        u, dt, -mixer.A_log.exp(), B, C, D, None, mixer.dt_bias, None, seq_idx, True, mixer.dt_limit
    )
    y = y.flatten(-2)
    if mixer.rmsnorm:
        size = dim // mixer.ngroups
        y = definitions.gated_norm(y, mixer.norm.weight, None, z, 1e-5, size, mixer.norm_before_gate, rms=True)
    else:
        y = y * F.silu(z)
    expected = mixer.out_proj(torch.cat([F.silu(gate) * passed, y], -1))
    assert_same(mixer(x, seq_idx=seq_idx), expected)


@pytest.mark.parametrize("name", ["Mamba2", "Mamba3", "Mamba3 of several inputs"])
def test_packed_sequences_are_kept_apart_however_they_are_marked(name: str) -> None:
    mixer, x = disturbed(MIXERS[name]()), sequence(batch=1)
    expected = torch.cat([mixer(x[:, :3]), mixer(x[:, 3:])], 1)
    bounds = torch.tensor([0, 3, LENGTH], dtype=torch.int32)
    assert_same(mixer(x, cu_seqlens=bounds), expected)
    assert_same(mixer(x, seq_idx=torch.tensor([[0] * 3 + [1] * 6], dtype=torch.int32)), expected)


@pytest.mark.parametrize("name", ["Mamba2", "Mamba3"])
def test_packed_prompts_carry_on_as_a_batch(name: str) -> None:
    mixer, x = disturbed(MIXERS[name]()), sequence(batch=1)
    params = InferenceParams(LENGTH, 2)
    mixer(x, cu_seqlens=torch.tensor([0, 3, LENGTH], dtype=torch.int32), inference_params=params)
    params.seqlen_offset = LENGTH
    after = sequence(batch=2, length=1)
    y = mixer(after, inference_params=params)
    for row, prompt in enumerate((x[:, :3], x[:, 3:])):
        assert_same(y[row : row + 1], mixer(torch.cat([prompt, after[row : row + 1]], 1))[:, -1:])


def test_mamba_2_takes_rows_laid_end_to_end_with_their_length() -> None:
    mixer, x = disturbed(MIXERS["Mamba2"]()), sequence()
    assert_same(mixer(x.flatten(0, 1), seqlen=LENGTH), mixer(x).flatten(0, 1))


def test_the_step_of_mamba_3_has_no_axis_of_length() -> None:
    mixer, x = disturbed(MIXERS["Mamba3"]()), sequence()
    states = mixer.allocate_inference_cache(BATCH, LENGTH)
    y, *after = mixer.step(x[:, 0], *states)
    assert_same(y, mixer(x[:, :1])[:, 0])
    assert all(a is b for a, b in zip(states, after, strict=True))


def test_parameters_have_the_names_and_shapes_of_the_checkpoints() -> None:
    shapes = {
        Mamba: {
            "A_log": (128, 16),
            "D": (128,),
            "in_proj.weight": (256, 64),
            "conv1d.weight": (128, 1, 4),
            "conv1d.bias": (128,),
            "x_proj.weight": (36, 128),
            "dt_proj.weight": (128, 4),
            "dt_proj.bias": (128,),
            "out_proj.weight": (64, 128),
        },
        Mamba2: {
            "A_log": (2,),
            "D": (2,),
            "dt_bias": (2,),
            "in_proj.weight": (514, 64),
            "conv1d.weight": (384, 1, 4),
            "conv1d.bias": (384,),
            "norm.weight": (128,),
            "out_proj.weight": (64, 128),
        },
        Mamba3: {
            "D": (2,),
            "dt_bias": (2,),
            "B_bias": (2, 1, 128),
            "C_bias": (2, 1, 128),
            "B_norm.weight": (128,),
            "C_norm.weight": (128,),
            "in_proj.weight": (550, 64),
            "out_proj.weight": (64, 128),
        },
    }
    for kind, expected in shapes.items():
        assert {name: tuple(t.shape) for name, t in kind(64).state_dict().items()} == expected


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Mamba(8, dt_init="zero"), "dt_init"),
        (lambda: Mamba2(64, process_group=object()), "process_group"),
        (lambda: Mamba3(64, dropout=0.1), "dropout"),
        (lambda: Mamba3(64, is_mimo=True, mimo_rank=1), "mimo_rank"),
        (lambda: Mamba(8).allocate_inference_cache(1, 2, paged=True), "paged"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_named(make, named: str) -> None:
    with pytest.raises(NotServed, match=named):
        make()


def test_sequences_that_are_marked_in_two_ways_must_agree() -> None:
    mixer, bounds = MIXERS["Mamba2"](), torch.tensor([0, 4, LENGTH])
    seq_idx = torch.tensor([[0] * 3 + [1] * 6])
    with pytest.raises(DataError, match="disagree"):
        mixer(sequence(batch=1), seq_idx=seq_idx, cu_seqlens=bounds)
    with pytest.raises(DataError, match="batch of 1"):
        mixer(sequence(), cu_seqlens=bounds)


def test_constant_steps_are_constant() -> None:
    mixer = Mamba(32, dt_init="constant", dt_scale=3.0)
    assert (mixer.dt_proj.weight == 3.0 * 2**-0.5).all()
