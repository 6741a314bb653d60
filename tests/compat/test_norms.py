"""The norms of mamba_ssm against their definition."""

import functools

import pytest
import torch
from tests.compat import definitions
from tests.compat.agreement import assert_agrees, assert_same

from mambakit.compat import NotServed, gated_norms, norms
from mambakit.errors import DataError

DIM, SIZE = 12, 4

randn = functools.partial(torch.randn, dtype=torch.float64)


def gated_definition(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm):
    size = DIM if group_size is None else group_size
    return definitions.gated_norm(x, weight, bias, z, eps, size, norm_before_gate, is_rms_norm)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("size", [None, SIZE])
def test_the_gated_norm_agrees_with_its_definition(before: bool, rms: bool, size: int | None) -> None:
    tensors = {"x": randn(3, 5, DIM), "weight": randn(DIM), "bias": randn(DIM), "z": randn(3, 5, DIM)}
    options = {"eps": 1e-2, "group_size": size, "norm_before_gate": before, "is_rms_norm": rms}
    assert_agrees(gated_norms.layernorm_fn, gated_definition, tensors, **options)


def test_the_gated_norm_without_a_gate_is_a_norm() -> None:
    x, weight = randn(3, DIM), randn(DIM)
    expected = definitions.norm(x, weight, None, 1e-6, DIM, rms=True)
    assert_same(gated_norms.rmsnorm_fn(x, weight, None), expected)


@pytest.mark.parametrize(("kind", "rms"), [(gated_norms.RMSNorm, True), (gated_norms.LayerNorm, False)])
def test_a_gated_norm_layer_has_mamba_ssms_parameters_and_defaults(kind, rms: bool) -> None:
    layer = kind(DIM, dtype=torch.float64)
    names = {"weight"} if rms else {"weight", "bias"}
    assert set(layer.state_dict()) == names
    x, z = randn(2, 3, DIM)
    expected = definitions.gated_norm(x, layer.weight, layer.bias, z, 1e-5, DIM, True, rms)
    assert_same(layer(x, z), expected)


def test_a_group_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(DataError, match="group_size must divide the 12 channels"):
        gated_norms.rmsnorm_fn(randn(2, DIM), randn(DIM), None, group_size=5)


def fused_definition(x, weight, bias, residual, x1, weight1, bias1, eps, is_rms_norm):
    total = x + x1 + residual
    first = definitions.norm(total, weight, bias, eps, DIM, is_rms_norm)
    return first, definitions.norm(total, weight1, bias1, eps, DIM, is_rms_norm), total


@pytest.mark.parametrize("rms", [False, True])
def test_the_fused_norm_adds_normalises_twice_and_returns_the_sum(rms: bool) -> None:
    tensors = {name: randn(3, 5, DIM) for name in ("x", "residual", "x1")}
    tensors |= {name: randn(DIM) for name in ("weight", "bias", "weight1", "bias1")}
    fused = functools.partial(norms.layer_norm_fn, prenorm=True)
    assert_agrees(fused, fused_definition, tensors, eps=1e-2, is_rms_norm=rms)


def test_the_fused_norm_scales_rows() -> None:
    x, weight, scale = randn(3, 5, DIM), randn(DIM), randn(3, 5)
    expected = definitions.norm(x * scale[..., None], weight, None, 1e-6, DIM, rms=True)
    assert_same(norms.rms_norm_fn(x, weight, None, rowscale=scale), expected)


def test_dropout_takes_entries_out_and_scales_the_others() -> None:
    x = torch.ones(400, DIM)
    _, total = norms.rms_norm_fn(x, torch.ones(DIM), None, dropout_p=0.25, prenorm=True)
    assert total.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (total == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("residual", "in_float32", "expected"),
    [
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (torch.float32, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_the_sum_has_the_dtype_of_the_residual(residual, in_float32: bool, expected: torch.dtype) -> None:
    x = torch.randn(2, DIM, dtype=torch.bfloat16)
    before = None if residual is None else torch.randn(2, DIM, dtype=residual)
    y, total = norms.RMSNorm(DIM)(x, before, prenorm=True, residual_in_fp32=in_float32)
    assert (y.dtype, total.dtype) == (torch.bfloat16, expected)


def test_what_the_fused_norm_cannot_honour_is_refused() -> None:
    x, weight = randn(2, DIM), randn(DIM)
    with pytest.raises(NotServed, match="return_dropout_mask"):
        norms.layer_norm_fn(x, weight, None, return_dropout_mask=True)
    with pytest.raises(NotServed, match="rowscale"):
        norms.layer_norm_fn(x, weight, None, x1=x, rowscale=randn(2))
    with pytest.raises(NotServed, match="bias1"):
        norms.layer_norm_fn(x, weight, None, bias1=weight)
