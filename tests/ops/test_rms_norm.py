"""The root-mean-square norms: against the formula, and the backends against each other."""

import functools

import pytest
import torch
from tests.ops.agreement import DTYPES, assert_backend_agrees
from tests.ops.backends import TRITON
from torch import Tensor

from mambakit.ops import gated_rms_norm, rms_norm


def make(dtype: torch.dtype = torch.float32, *shape: int) -> dict[str, Tensor]:
    shape = shape or (2, 7, 12)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, z = torch.randn(2, *shape).to(dtype).unbind()
    return {"x": x, "weight": torch.randn(shape[-1], dtype=wide), "z": z}


def plain(x: Tensor, weight: Tensor, groups: int = 1, backend: str | None = None) -> tuple[Tensor]:
    return (rms_norm(x, weight, groups=groups, backend=backend),)


def gated(
    x: Tensor, weight: Tensor, z: Tensor, groups: int = 1, before: bool = False, backend: str | None = None
) -> tuple[Tensor]:
    return (gated_rms_norm(x, weight, z, groups=groups, norm_before_gate=before, backend=backend),)


def test_mean_square_of_every_group_becomes_one() -> None:
    x = 100 * torch.randn(5, 12, dtype=torch.float64)
    y = rms_norm(x, torch.ones(12, dtype=torch.float64), groups=3)
    torch.testing.assert_close(y.view(5, 3, 4).square().mean(-1), torch.ones(5, 3, dtype=torch.float64))


def test_gate_stands_before_the_norm_or_after_it() -> None:
    t = make(torch.float64)
    gate = t["z"] * torch.sigmoid(t["z"])
    torch.testing.assert_close(gated(**t)[0], rms_norm(t["x"] * gate, t["weight"]))
    torch.testing.assert_close(gated(**t, before=True)[0], rms_norm(t["x"], t["weight"]) * gate)


@pytest.mark.parametrize("backend", ["portable", *TRITON])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_backend_agrees_with_the_reference(groups: int, dtype: torch.dtype, backend: str) -> None:
    t = make(dtype)
    assert_backend_agrees(functools.partial(gated, groups=groups), t, backend, dtype)
    assert_backend_agrees(functools.partial(gated, groups=groups, before=True), t, backend, dtype)
    del t["z"]
    assert_backend_agrees(functools.partial(plain, groups=groups), t, backend, dtype)


@pytest.mark.parametrize("backend", ["portable", *TRITON])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (1, 1, 1, 2), (700, 3)])
def test_any_number_of_leading_axes(shape: tuple[int, ...], backend: str) -> None:
    assert_backend_agrees(gated, make(torch.float32, *shape), backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
def test_kernel_of_the_gpu_reads_parts_of_rows_where_they_lie(backend: str) -> None:
    t = make()
    t["x"], t["z"] = torch.randn(2, 7, 30)[..., 5:29].chunk(2, dim=-1)
    assert_backend_agrees(gated, t, backend, torch.float32)


@pytest.mark.parametrize("backend", TRITON)
def test_operator_of_the_gpu_passes_opcheck(backend: str) -> None:
    t = [x.requires_grad_() for x in make().values()]
    torch.library.opcheck(torch.ops.mambakit.rms_norm.default, (*t, 1e-5, 2, False, True, backend))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_the_result_is_the_same(dtype: torch.dtype, groups: int, before: bool) -> None:
    t = make(dtype, 2, 150, 12)  # more rows than a block
    t["z"] = torch.cat([t["z"], t["x"]], -1)[..., :12]  # a slice, as a mixer gives it
    recorded = gated(t["x"].clone().requires_grad_(), t["weight"], t["z"], groups, before)[0].detach()
    with torch.no_grad():
        found = gated(**t, groups=groups, before=before)[0]
        ungated = plain(t["x"], t["weight"], groups)[0]
    assert found.dtype == ungated.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(dtype, 1e-6)  # one rounding
    torch.testing.assert_close(found.to(wide), recorded.to(wide), rtol=bound, atol=bound)
    recorded = plain(t["x"].clone().requires_grad_(), t["weight"], groups)[0].detach()
    torch.testing.assert_close(ungated.to(wide), recorded.to(wide), rtol=bound, atol=bound)


def test_sums_are_float32_for_half_precision() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its squares overflow float16
    torch.testing.assert_close(rms_norm(x, torch.ones(4096)), torch.ones_like(x))


def test_gradients_pass_gradcheck() -> None:
    t = [x.requires_grad_() for x in make(torch.float64, 2, 6).values()]
    assert torch.autograd.gradcheck(functools.partial(gated, groups=2), t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "groups must divide dim"),
        ({"groups": 0}, "groups must divide dim"),
        ({"weight": torch.ones(11)}, "weight must have shape"),
        ({"z": torch.ones(12)}, "z must have shape"),
        ({"x": torch.ones(())}, "x must have shape"),
        ({"backend": "cpu"}, "can't serve"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{**make(), **change})
