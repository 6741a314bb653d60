"""The scans of mamba_ssm against their definitions, with each shape and option that they take."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from tests.compat import definitions
from tests.compat.agreement import assert_agrees, assert_same
from torch import Tensor

from mambakit.compat import NotServed
from mambakit.compat.scans import (
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
)
from mambakit.errors import DataError

BATCH, DIM, STATE, LENGTH = 2, 6, 4, 11
HEADS, HEADDIM, GROUPS = 4, 3, 2

randn = functools.partial(torch.randn, dtype=torch.float64)
rand = functools.partial(torch.rand, dtype=torch.float64)


def scan_tensors(B: Tensor, C: Tensor) -> dict[str, Tensor]:
    shape = (BATCH, DIM, LENGTH)
    return {"u": randn(shape), "delta": randn(shape), "A": -rand(DIM, STATE), "B": B, "C": C}


def ssd_tensors(batch: int = BATCH) -> dict[str, Tensor]:
    return {
        "x": randn(batch, LENGTH, HEADS, HEADDIM),
        "dt": randn(batch, LENGTH, HEADS),
        "A": -rand(HEADS),
        "B": randn(batch, LENGTH, GROUPS, STATE),
        "C": randn(batch, LENGTH, GROUPS, STATE),
        "dt_bias": randn(HEADS),
    }


VECTORS = {
    "one for all positions": (DIM, STATE),
    "of each position": (BATCH, STATE, LENGTH),
    "of groups": (BATCH, 2, STATE, LENGTH),
    "of other groups": (BATCH, 3, STATE, LENGTH),
}


@pytest.mark.parametrize("of_B", VECTORS)
@pytest.mark.parametrize("of_C", VECTORS)
def test_the_scan_of_mamba_1_takes_every_shape_of_its_vectors(of_B: str, of_C: str) -> None:
    tensors = scan_tensors(randn(VECTORS[of_B]), randn(VECTORS[of_C]))
    definition = definitions.selective_scan
    scan = functools.partial(selective_scan_fn, return_last_state=True)
    assert_agrees(scan, definition, tensors, delta_softplus=True)


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_ref])
def test_the_scan_of_mamba_1_honours_skip_gate_and_bias(scan) -> None:
    tensors = scan_tensors(randn(BATCH, STATE, LENGTH), randn(BATCH, STATE, LENGTH))
    tensors |= {"D": randn(DIM), "z": randn(BATCH, DIM, LENGTH), "delta_bias": randn(DIM)}
    both = functools.partial(scan, return_last_state=True)
    assert_agrees(both, definitions.selective_scan, tensors, delta_softplus=True)


def test_the_scan_of_mamba_1_takes_steps_as_they_are_without_softplus() -> None:
    tensors = scan_tensors(randn(BATCH, STATE, LENGTH), randn(BATCH, STATE, LENGTH))
    tensors["delta"] = tensors["delta"].abs()
    both = functools.partial(selective_scan_fn, return_last_state=True)
    assert_agrees(both, definitions.selective_scan, tensors, delta_softplus=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_of_mamba_1_returns_the_dtype_of_u_and_a_state_in_float32(dtype: torch.dtype) -> None:
    tensors = scan_tensors(randn(BATCH, STATE, LENGTH), randn(BATCH, STATE, LENGTH))
    narrow = {name: t.float() if name == "A" else t.to(dtype) for name, t in tensors.items()}
    y, state = selective_scan_fn(**narrow, delta_softplus=True, return_last_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    expected, _ = definitions.selective_scan(**narrow, delta_softplus=True)
    assert_same(y, expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_scan_of_mamba_1_lays_out_its_output_as_its_input() -> None:
    tensors = scan_tensors(randn(BATCH, STATE, LENGTH), randn(BATCH, STATE, LENGTH))
    y = selective_scan_fn(**tensors)
    assert y.view(-1).shape == (BATCH * DIM * LENGTH,)  # callers view it


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_ref])
def test_a_complex_rate_is_refused(scan) -> None:
    tensors = scan_tensors(randn(BATCH, STATE, 2 * LENGTH), randn(BATCH, STATE, 2 * LENGTH))
    with pytest.raises(NotServed, match="complex A"):
        scan(**{**tensors, "A": torch.complex(tensors["A"], tensors["A"])})


def inner_tensors() -> dict[str, Tensor]:
    rank, width, model = 2, 4, 5
    return {
        "xz": randn(BATCH, 2 * DIM, LENGTH),
        "conv1d_weight": randn(DIM, 1, width),
        "conv1d_bias": randn(DIM),
        "x_proj_weight": randn(rank + 2 * STATE, DIM),
        "delta_proj_weight": randn(DIM, rank),
        "out_proj_weight": randn(model, DIM),
        "out_proj_bias": randn(model),
        "A": -rand(DIM, STATE),
        "D": randn(DIM),
        "delta_bias": randn(DIM),
    }


def inner_definition(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, D, delta_bias,
    B=None, C=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    x, z = xz.chunk(2, dim=1)
    u = definitions.convolution(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    projected = torch.einsum("bdl,pd->bpl", u, x_proj_weight)
    dt, own_B, own_C = projected.split([delta_proj_weight.shape[1], A.shape[1], A.shape[1]], dim=1)
    delta = torch.einsum("brl,dr->bdl", dt, delta_proj_weight)

    def normed(t, weight):
        return definitions.norm(t.mT, weight, None, b_c_dt_rms_eps, t.shape[1], rms=True).mT

    if B is None:
        B = own_B if B_proj_bias is None else own_B + B_proj_bias[:, None]
    if C is None:
        C = own_C if C_proj_bias is None else own_C + C_proj_bias[:, None]
    B = B if b_rms_weight is None else normed(B, b_rms_weight)
    C = C if c_rms_weight is None else normed(C, c_rms_weight)
    delta = delta if dt_rms_weight is None else normed(delta, dt_rms_weight)
    y, _ = definitions.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


@pytest.mark.parametrize(
    "further",
    [
        {},
        {"B_proj_bias": (STATE,), "C_proj_bias": (STATE,)},
        {"b_rms_weight": (STATE,), "c_rms_weight": (STATE,), "dt_rms_weight": (DIM,)},
        {"B": (DIM, STATE), "C": (BATCH, STATE, LENGTH)},
    ],
    ids=["plain", "biases", "norms", "given vectors"],
)
def test_the_inner_function_of_mamba_1_is_the_mixer_between_its_projections(further: dict) -> None:
    tensors = inner_tensors() | {name: randn(shape) for name, shape in further.items()}
    if "B" in further:  # then nothing of x_proj but the step's rows is used
        tensors["x_proj_weight"][2:] = 0
    assert_agrees(mamba_inner_fn, inner_definition, tensors)


def test_the_inner_function_refuses_what_it_cannot_honour() -> None:
    tensors = inner_tensors()
    with pytest.raises(NotServed, match="checkpoint_lvl"):
        mamba_inner_fn(**tensors, checkpoint_lvl=2)
    with pytest.raises(NotServed, match="B_proj_bias"):
        mamba_inner_fn(**tensors, B=randn(DIM, STATE), B_proj_bias=randn(STATE))


@pytest.mark.parametrize("tied", [False, True], ids=["a rate for each", "a rate a head"])
def test_a_step_of_heads_updates_the_state_in_place(tied: bool) -> None:
    tensors = ssd_tensors() | {"D": randn(HEADS), "z": randn(BATCH, LENGTH, HEADS, HEADDIM)}
    expected, final = definitions.chunk_scan(**tensors, dt_softplus=True)
    state = torch.zeros(BATCH, HEADS, HEADDIM, STATE, dtype=torch.float64)
    place = state.data_ptr()
    spread = (lambda t: t) if tied else torch.Tensor.contiguous
    for t in range(LENGTH):
        y = selective_state_update(
            state,
            tensors["x"][:, t],
            spread(tensors["dt"][:, t, :, None].expand(-1, -1, HEADDIM)),
            spread(tensors["A"][:, None, None].expand(-1, HEADDIM, STATE)),
            tensors["B"][:, t],
            tensors["C"][:, t],
            spread(tensors["D"][:, None].expand(-1, HEADDIM)),
            tensors["z"][:, t],
            spread(tensors["dt_bias"][:, None].expand(-1, HEADDIM)),
            dt_softplus=True,
        )
        assert_same(y, expected[:, t])
    assert state.data_ptr() == place
    assert_same(state, final)


def test_a_step_without_heads_updates_the_rows_named_and_no_other() -> None:
    tensors = scan_tensors(randn(BATCH, STATE, LENGTH), randn(BATCH, STATE, LENGTH))
    expected, final = definitions.selective_scan(**tensors, delta_softplus=True)
    state = torch.zeros(4, DIM, STATE, dtype=torch.float64)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    for t in range(LENGTH):
        at = {name: tensors[name][..., t] for name in ("u", "delta", "B", "C")}
        y = selective_state_update(
            state, at["u"], at["delta"], tensors["A"], at["B"], at["C"], dt_softplus=True, state_batch_indices=rows
        )
        assert_same(y, expected[..., t])
    assert_same(state[[3, 1]], final)
    assert not state[[0, 2]].any()


def test_a_step_writes_a_half_precision_state_in_its_dtype() -> None:
    state = randn(BATCH, DIM, STATE).to(torch.bfloat16)
    before = state.clone()
    x, dt = torch.randn(2, BATCH, DIM, dtype=torch.bfloat16)
    y = selective_state_update(state, x, dt, -torch.rand(DIM, STATE), *torch.randn(2, BATCH, STATE), dt_softplus=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not torch.equal(state, before)


OPTIONS: dict[str, dict] = {
    "plain": {},
    "skip a head, gate": {"D": (HEADS,), "z": (BATCH, LENGTH, HEADS, HEADDIM)},
    "skip a channel, initial states": {"D": (HEADS, HEADDIM), "initial_states": (BATCH, HEADS, HEADDIM, STATE)},
}


@pytest.mark.parametrize("named", OPTIONS)
def test_the_scan_of_mamba_2_agrees_with_its_definition(named: str) -> None:
    tensors = ssd_tensors() | {name: randn(shape) for name, shape in OPTIONS[named].items()}
    scan = functools.partial(mamba_chunk_scan_combined, chunk_size=4, return_final_states=True)
    assert_agrees(scan, definitions.chunk_scan, tensors, dt_softplus=True, dt_limit=(0.3, 1.5))


SEQUENCES = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3], [5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6]], dtype=torch.int32)


def test_the_scan_of_mamba_2_keeps_the_sequences_of_every_row_apart() -> None:
    tensors = ssd_tensors() | {"initial_states": randn(BATCH, HEADS, HEADDIM, STATE), "seq_idx": SEQUENCES}
    scan = functools.partial(mamba_chunk_scan_combined, chunk_size=4, return_final_states=True)
    assert_agrees(scan, definitions.chunk_scan, tensors, dt_softplus=True)


def test_the_scan_of_mamba_2_returns_the_state_of_each_packed_sequence() -> None:
    tensors, bounds = ssd_tensors(batch=1), [0, 4, 4, 11]
    out, final, states = mamba_chunk_scan_combined(
        **tensors,
        chunk_size=4,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        dt_softplus=True,
        return_final_states=True,
        return_varlen_states=True,
    )
    assert not states[1].any()
    assert_same(final, states[2:])
    for index, (begin, end) in enumerate([(0, 4), (4, 11)]):
        alone = {name: t[:, begin:end] if name in ("x", "dt", "B", "C") else t for name, t in tensors.items()}
        y, state = definitions.chunk_scan(**alone, dt_softplus=True)
        assert_same(out[:, begin:end], y)
        assert_same(states[[0, 2]][index : index + 1], state)


def test_the_scan_of_mamba_2_refuses_what_contradicts_itself() -> None:
    tensors, bounds = ssd_tensors(batch=1), torch.tensor([0, 5, LENGTH])
    with pytest.raises(DataError, match="disagree"):
        mamba_chunk_scan_combined(**tensors, chunk_size=4, seq_idx=SEQUENCES[:1], cu_seqlens=bounds)
    with pytest.raises(DataError, match="needs cu_seqlens"):
        mamba_chunk_scan_combined(**tensors, chunk_size=4, return_varlen_states=True)
    states, apart = randn(2, HEADS, HEADDIM, STATE), torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]])
    with pytest.raises(NotServed, match="initial_states"):
        mamba_chunk_scan_combined(**tensors, chunk_size=4, cu_seqlens=bounds, initial_states=states)
    with pytest.raises(DataError, match="neighbours"):
        mamba_chunk_scan_combined(**tensors, chunk_size=4, seq_idx=apart)


def split_definition(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states=None, seq_idx=None, dt_limit=(0.0, math.inf),
    rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, norm_before_gate=True,
):  # fmt: skip
    heads, dim, shared = A.shape[0], HEADS * HEADDIM, GROUPS * STATE
    mlp = (zxbcdt.shape[-1] - 2 * dim - 2 * shared - heads) // 2
    gate, passed, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, dim + 2 * shared, heads], dim=-1)
    xBC = definitions.convolution(xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation="silu").mT
    x, B, C = xBC.split([dim, shared, shared], dim=-1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, GROUPS), (C, GROUPS)))
    y, final = definitions.chunk_scan(
        x, dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, dt_softplus=True, dt_limit=dt_limit
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = y * F.silu(z)
    else:
        size = dim // GROUPS
        y = definitions.gated_norm(y, rmsnorm_weight, None, z, rmsnorm_eps, size, norm_before_gate, rms=True)
    y = torch.cat([F.silu(gate) * passed, y], -1)
    return (y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)), final


@pytest.mark.parametrize("mlp", [0, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_before_gate": True}, {"norm_before_gate": False}, {"dt_limit": (0.2, 1.0)}],
    ids=["gate", "norm then gate", "gate then norm", "limit"],
)
def test_the_split_function_of_mamba_2_is_the_mixer_between_its_projections(mlp: int, options: dict) -> None:
    dim, shared = HEADS * HEADDIM, GROUPS * STATE
    tensors = {
        "zxbcdt": randn(BATCH, LENGTH, 2 * mlp + 2 * dim + 2 * shared + HEADS),
        "conv1d_weight": randn(dim + 2 * shared, 4),
        "conv1d_bias": randn(dim + 2 * shared),
        "dt_bias": randn(HEADS),
        "A": -rand(HEADS),
        "D": randn(HEADS),
        "outproj_weight": randn(7, mlp + dim),
        "outproj_bias": randn(7),
        "initial_states": randn(BATCH, HEADS, HEADDIM, STATE),
        "seq_idx": SEQUENCES,
    }
    if "norm_before_gate" in options:
        tensors["rmsnorm_weight"] = randn(dim)
    split = functools.partial(mamba_split_conv1d_scan_combined, chunk_size=4, ngroups=GROUPS, return_final_states=True)
    assert_agrees(split, split_definition, tensors, headdim=HEADDIM, **options)


def test_the_split_function_refuses_an_unknown_activation() -> None:
    with pytest.raises(NotServed, match="activation"):
        mamba_split_conv1d_scan_combined(*[randn(1)] * 6, chunk_size=4, activation="relu")


def test_a_state_of_one_head_takes_rows_without_the_axis_of_heads() -> None:
    state = randn(BATCH, 1, DIM, STATE)
    x, dt, z = randn(3, BATCH, DIM)
    A, (B, C), (D, dt_bias) = -rand(DIM, STATE), randn(2, BATCH, STATE), randn(2, DIM)
    same = state[:, 0].clone()
    expected = selective_state_update(same, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True)
    y = selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True)
    assert_same(y, expected[:, None])
    assert_same(state, same[:, None])
