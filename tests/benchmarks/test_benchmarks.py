"""The benchmarks at sizes of milliseconds: they run, and what they compare computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.baselines import stepwise_scan, unbind_scan
from benchmarks.case import Case, Goal, Peer
from benchmarks.cases import all_cases, convolution, mixer, scan, step, training_step
from benchmarks.eager_step import EagerStep
from benchmarks.floors import Rates
from benchmarks.memory import SCANS, MemoryResult, MemorySample, available, measure
from benchmarks.runner import run_case
from benchmarks.timing import Pace, Timing

from mambakit.nn import Backbone, Stepper

RATES = Rates(copy_bytes=1e9, product_flops=1e9, torch_flops=1e9, exponentials=1e9)
ONE_RUN = Pace(turns=1, turn_seconds=1e-6)
ROOT = Path(__file__).parents[2]

SMALL = [
    *scan.cases(batch=1, length=6, dim=8, state=4),
    *convolution.cases(batch=2, length=6, channels=4, width=3),
    *mixer.cases(d_model=16, forward_length=6, backward_length=5),
    *step.cases(d_model=16, headdim=8),
    *training_step.cases(length=4, short_lengths=()),
]


def silent(message: str) -> None:
    """A notice that nobody reads."""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_case_times_ours_and_each_peer_that_is_installed(case: Case) -> None:
    result = run_case(case, silent, pace=ONE_RUN)
    assert result.ours.median > 0
    assert [peer.peer.name for peer in result.peers] == [peer.name for peer in case.peers]
    assert all((peer.timing is None) == peer.absent.startswith("not installed") for peer in result.peers)
    assert case.floor is None or case.floor(RATES).ms > 0


@pytest.mark.parametrize("loop", [unbind_scan, stepwise_scan])
def test_the_loops_compute_what_ours_computes(loop) -> None:
    inputs = scan.Inputs.random(batch=2, length=7, dim=8, state=4)
    torch.testing.assert_close(loop(*inputs), scan.our_scan(*inputs), rtol=1e-4, atol=1e-5)


def test_the_eager_step_computes_what_ours_computes() -> None:
    backbone = Backbone(16, 2)
    ours, eager = Stepper(backbone, 2), EagerStep(backbone, 2)
    with torch.no_grad():
        for x in torch.randn(3, 2, 16):
            torch.testing.assert_close(eager(x), ours(x), rtol=1e-4, atol=1e-5)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_a_goal_is_met_when_the_peer_takes_that_many_times_ours() -> None:
    assert Goal(2).met(2.0)
    assert not Goal(2).met(1.9)
    assert str(Goal(1 / 1.5)) == ">= 1/1.5x"


def test_a_missing_library_is_named_and_the_rest_goes_on() -> None:
    def prepare(_: None) -> None:
        import a_library_that_nobody_has  # noqa: F401

    case = Case("name", "shape", lambda: None, lambda _: lambda: None, (Peer("peer", prepare),))
    (peer,) = run_case(case, silent, pace=ONE_RUN).peers
    assert peer.absent == "not installed (a_library_that_nobody_has)"


def test_quick_leaves_out_the_peers_of_one_run() -> None:
    peer = Peer("slow", lambda _: pytest.fail("prepared"), once=True)
    case = Case("name", "shape", lambda: None, lambda _: lambda: None, (peer,))
    (result,) = run_case(case, silent, quick=True, pace=ONE_RUN).peers
    assert result.timing is None


def test_a_single_run_has_no_spread() -> None:
    assert Timing((3.0,)).spread == 0
    assert Timing((1.0, 2.0, 3.0)).median == 2.0


@pytest.mark.skipif(not available(), reason="this system does not tell the peak of a process")
def test_ours_keeps_less_than_one_tensor_of_states_and_the_loop_more() -> None:
    ours, loop = (measure(name, lengths=(64,), dim=64, state=16) for name in SCANS)
    assert ours.keeps_no_states
    assert not loop.keeps_no_states


def test_a_quadratic_peak_is_not_linear() -> None:
    samples = tuple(MemorySample(n, n * n, 0) for n in (512, 1024, 2048, 4096))
    assert not MemoryResult("quadratic", 1, 1, samples).linear


def test_the_command_prints_a_table_and_writes_the_record(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "mixer step", "--json", str(record)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "mixer step" in output
    (case,) = json.loads(record.read_text())["cases"]
    assert case["ours"]["median_ms"] > 0
