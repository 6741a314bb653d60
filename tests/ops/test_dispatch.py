"""The choice of a backend: an argument is an order, the environment variable a wish for operations that have it."""

import pytest
import torch
from tests.ops.backends import DEVICE, TRITON

from mambakit.nn import Mamba2
from mambakit.ops import dispatch, selective_scan


def test_the_variable_leaves_operations_without_the_backend_to_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAKIT_BACKEND", "cpu")
    assert dispatch.choose(torch.device("cpu"), None, ("portable", "reference")) == "portable"
    with pytest.raises(ValueError, match="backend='cpu' can't serve: this operation runs on portable"):
        dispatch.choose(torch.device("cpu"), "cpu", ("portable", "reference"))


def test_the_variable_is_an_error_where_the_backend_exists_and_can_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAKIT_BACKEND", "portable")
    with pytest.raises(ValueError, match="MAMBAKIT_BACKEND='portable' can't serve: too odd"):
        dispatch.choose(torch.device("cpu"), None, ("portable", "reference"), lambda name: "too odd")
    monkeypatch.setenv("MAMBAKIT_BACKEND", "fastest")
    with pytest.raises(ValueError, match="is not a backend"):
        dispatch.choose(torch.device("cpu"), None, ("portable", "reference"))


@pytest.mark.parametrize("backend", ["portable", "reference", *(["cpu"] if DEVICE == "cpu" else []), *TRITON])
def test_a_whole_layer_runs_on_the_backend_of_the_variable(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Mamba2(8, d_state=4, headdim=8), torch.randn(1, 5, 8)
    expected, _ = layer(x)
    monkeypatch.setenv("MAMBAKIT_BACKEND", backend)
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_tensor_on_another_device_is_refused_by_name() -> None:
    u, delta, A = torch.randn(1, 3, 4), torch.rand(1, 3, 4), torch.empty(4, 2, device="meta")
    B, C = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match=f"A must be on {u.device} as u is, and is on meta"):
        selective_scan(u, delta, A, B, C)
