"""What `python -m benchmarks.gpu` makes of times and results: no GPU is needed for that."""

import subprocess
import sys

import pytest
import torch
from benchmarks.gpu_case import Case, Ceilings, Contender, Floor
from benchmarks.gpu_layers import cases

from benchmarks import gpu

CEILINGS = Ceilings(bytes_a_second=4e12, matrix_operations_a_second=7e14, exponentials_a_second=3e12)


def test_a_case_is_judged_and_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_milliseconds", lambda call, budget: [call()] * 3)

    def absent() -> Contender:
        raise ImportError("No module named 'fla'")

    ours = Contender(lambda: 1.0, lambda: 4.0, lambda: {"y": torch.ones(2)})
    theirs = Contender(lambda: 2.0, lambda: 6.0, lambda: {"y": torch.full((2,), 1.1)})
    case = Case(
        "scan",
        "(1, 2)",
        torch.bfloat16,
        {
            "mambakit": lambda: ours,
            "mamba-ssm": lambda: theirs,
            "fla": absent,
            "broken": lambda: Contender(lambda: 1 / 0),
        },
        Floor(bytes=2e9),
        Floor(bytes=8e9),
        forward_goal=1.5,
        forward_backward_goal=1.7,
        exact=lambda: {"y": torch.ones(2, dtype=torch.float64)},
    )
    result = gpu.run(case, CEILINGS, quick=False)
    assert result["forward"]["floor"] == pytest.approx(0.5)
    assert result["forward"]["times_the_floor"] == pytest.approx(2)
    assert (result["forward"]["times_faster"], result["forward"]["goal_met"]) == (2.0, True)
    assert (result["forward_backward"]["times_faster"], result["forward_backward"]["goal_met"]) == (1.5, False)
    assert set(result["absent"]) == {"fla", "broken"}
    assert result["absent"]["fla"].startswith("absent")
    assert result["errors"]["mambakit"]["y"] == 0
    assert result["errors"]["mamba-ssm"]["y"] == pytest.approx(0.1)


def test_cases_name_ours_and_the_rival() -> None:
    for case in cases():
        assert {"mambakit", case.rival} <= set(case.contenders)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("module", ["benchmarks.gpu", "benchmarks.gpu_parallel"])
def test_without_a_gpu_one_line_says_so(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "CUDA GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
