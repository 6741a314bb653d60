"""The self-check of `mambakit doctor` passes here, and would notice a backend that computes something else."""

import pytest
import torch

from mambakit.ops import dispatch, self_check


def test_every_operation_agrees_on_every_backend_that_serves_the_cpu() -> None:
    checks = list(self_check.self_check())
    compared = [b for b in dispatch.BACKENDS if b not in ("triton", "reference")]
    serving = {b for b in compared if not dispatch.refusal(b, torch.device("cpu"))}
    assert {(c.operation, c.backend) for c in checks if c.device == "cpu"} == {
        (operation, backend)
        for operation in ("selective_scan", "causal_conv1d", "ssd", "mamba3_scan")
        for backend in serving
    } | {("gated_rms_norm", "portable"), ("cross_entropy", "portable")}
    assert all(check.passed for check in checks)


def test_a_wrong_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check.causal_conv1d

    def wrong(x: torch.Tensor, *args: torch.Tensor, backend: str, **options: object) -> object:
        return right(x * 1.001 if backend == "portable" else x, *args, backend=backend, **options)

    monkeypatch.setattr(self_check, "causal_conv1d", wrong)
    failed = {(check.operation, check.backend) for check in self_check.self_check() if not check.passed}
    assert failed == {("causal_conv1d", "portable")}
