"""What `python -m benchmarks.gpu` makes of times and results: no GPU is needed for that."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_case import OURS, Case, Ceilings, Contender, Floor
from benchmarks.gpu_report import markdown, print_errors, print_result, print_times, title
from rich.console import Console
from tests.warm_processes import run_module

from benchmarks import gpu, gpu_timing

CEILINGS = Ceilings(bytes_a_second=4e12, matrix_operations_a_second=7e14, exponentials_a_second=3e12)


@pytest.fixture(autouse=True)
def _times_are_what_calls_return(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(call: Callable[[], float], budget: float, pace: gpu_timing.Pace) -> gpu_timing.Samples:
        return gpu_timing.Samples([call()] * 3, [call() * pace.whole] * 3)

    monkeypatch.setattr(gpu_timing, "warm_up", lambda call: gpu_timing.Pace(0.1, 0.5))
    monkeypatch.setattr(gpu_timing, "take", take)
    monkeypatch.setattr(gpu_timing, "_runs", lambda call, count: [call()] * count)


def _case() -> Case:
    def absent() -> Contender:
        raise ImportError("No module named 'fla'")

    ours = Contender(lambda: 1.0, lambda: 4.0, lambda: {"y": torch.ones(2), "dx": torch.full((2,), 1.2)})
    theirs = Contender(lambda: 2.0, lambda: 6.0, lambda: {"y": torch.full((2,), 1.1), "dx": torch.ones(2)})
    return Case(
        "scan",
        "(1, 2)",
        torch.bfloat16,
        {
            OURS: lambda: ours,
            "mamba-ssm": lambda: theirs,
            "fla": absent,
            "broken": lambda: Contender(lambda: 1 / 0),
            "slow": lambda: Contender(lambda: 5000.0, once=True),
        },
        {"mamba-ssm": (1.5, 1.7), "fla": (1.0, None), "slow": (None, None)},
        Floor(bytes=1e9),
        Floor(bytes=4e9),
        exact=lambda: {name: torch.ones(2, dtype=torch.float64) for name in ("y", "dx")},
    )


def test_a_case_is_judged_and_an_absent_peer_is_named() -> None:
    result = gpu.run(_case(), CEILINGS)
    forward, both = result["forward"], result["forward_backward"]
    assert forward["floor"] == pytest.approx(0.25)
    assert forward["times_the_floor"] == pytest.approx(2)  # of the device's time, without the host's
    verdict = forward["rivals"]["mamba-ssm"]
    assert (verdict["times_faster"], verdict["goal_met"]) == (2.0, True)
    assert (both["rivals"]["mamba-ssm"]["times_faster"], both["rivals"]["mamba-ssm"]["goal_met"]) == (1.5, False)
    assert forward["rivals"]["fla"] == {
        "times_faster": None,
        "times_faster_on_the_device": None,
        "goal": 1.0,
        "goal_met": None,
    }
    assert set(result["refused"]) == {"fla", "broken, forward"}
    assert result["refused"]["fla"].startswith("absent")
    assert result["errors"][OURS]["y"] == 0
    assert result["errors"]["mamba-ssm"]["y"] == pytest.approx(0.1)


def test_what_takes_seconds_is_run_once() -> None:
    forward = gpu.run(_case(), CEILINGS)["forward"]
    assert forward["milliseconds"]["slow"] == 5000
    assert "slow" not in forward["device_milliseconds"]
    assert forward["rivals"]["slow"]["times_faster"] == 5000


def test_tables_show_both_clocks_and_what_ours_is_less_exact_in() -> None:
    console = Console(width=220, record=True)
    result = gpu.run(_case(), CEILINGS)
    print_result(console, result)
    print_times(console, [result])
    print_errors(console, [result])
    text = console.export_text()
    assert "forward, single call, ms: mambakit 1, mamba-ssm 2, slow 5,000" in text
    assert "forward, device alone, ms: mambakit 0.5, mamba-ssm 1" in text
    row = next(line for line in text.splitlines() if line.startswith("│ scan (1, 2) bfloat16 │ forward "))
    assert [cell.strip() for cell in row.strip("│").split("│")[2:]] == [
        *("1", "0.5", "0.25", "2", "mamba-ssm", "2", "1", "2", "2", "1.5", "yes")
    ]
    assert "dx 2.0e-01 / 0.0e+00" in text


def test_the_tables_of_the_page_follow_from_the_record() -> None:
    lines = list(markdown([gpu.run(_case(), CEILINGS)]))
    assert "| scan (1, 2) bfloat16 | forward | 1 / 0.5 | 0.25 | mamba-ssm | 2 / 1 | 2 / 2 | 1.5 met |" in lines
    assert "|  | forward+backward | 4 / 2 | 1 | mamba-ssm | 6 / 3 | 1.5 / 1.5 | 1.7 missed |" in lines
    assert "|  |  |  |  | fla | absent |  | 1 |" in lines
    assert lines[-1] == "| scan (1, 2) bfloat16 | mamba-ssm | 2.0e-01 / 1.0e-01 |  |"


def test_cases_name_ours_and_their_rivals() -> None:
    found = gpu.in_order(list(gpu.MODULES))
    for case in found:
        assert {OURS, *case.goals} <= set(case.contenders)
    first = [case.operation for case in found[: len(gpu.MODULES)]]
    assert first == ["selective scan", "ssd", "mamba3 SISO", "training step, Mamba-130m"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("module", ["benchmarks.gpu", "benchmarks.gpu_parallel"])
def test_without_a_gpu_one_line_says_so(module: str) -> None:
    done = run_module(module, cwd=None, environment=os.environ)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "CUDA GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _two_cases() -> Iterator[Case]:
    for number in range(2):
        contenders = {name: partial(_noted, f"{name} {number}") for name in (OURS, "rival")}
        yield replace(_case(), operation=f"scan {number}", contenders=contenders)


def _noted(name: str) -> Contender:
    return Contender(lambda: Path(os.environ["NOTES"]).joinpath(name).touch())


@pytest.mark.skipif(torch.cuda.is_available(), reason="synchronising would need no stand-in")
@pytest.mark.parametrize(("large", "rivals"), [(False, {"rival 0", "rival 1"}), (True, {"rival 1"})])
def test_processes_that_compile_beforehand_share_ours_and_what_fills_the_memory(
    large: bool, rivals: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "in_order", lambda names: list(_two_cases()) if large or len(names) > 1 else [])
    monkeypatch.setattr(gpu, "tune_in", lambda warmup, rep: None)
    monkeypatch.setattr(gpu, "share_configurations", lambda part, parts: None)
    gpu.call_once([title(vars(case)) for case in _two_cases()], part=1, parts=2)
    assert {path.name for path in tmp_path.iterdir()} == {f"{OURS} 1", *rivals}


def test_without_cases_nothing_is_compiled_beforehand() -> None:
    assert gpu.warm_up([], 4, 1.0).endswith("by 0 processes")


def test_processes_share_what_an_autotuner_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    tried = {}
    for part in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(autotuner, "prune_configs", lambda self, arguments: ["a", "b", "c", "d"][: arguments["most"]])
            gpu.share_configurations(part, 3)
            tried[part] = [autotuner.prune_configs(None, {"most": most}) for most in (4, 1)]
    assert tried == {0: [["a", "d"], ["a"]], 1: [["b"], ["a"]], 2: [["c"], ["a"]]}


def test_a_record_is_gone_on_with_where_it_is_of_the_same_gpu(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    facts = {"gpu": "H200", "versions": {"torch": "2.11.0"}}
    assert gpu.made_before(path, facts) == []
    result = gpu.run(_case(), CEILINGS)
    path.write_text(json.dumps({**facts, "cases": [result]}, default=str))
    (kept,) = gpu.made_before(path, facts)
    assert title(kept) == "scan (1, 2) bfloat16"
    with pytest.raises(SystemExit, match="another gpu: H200; choose"):
        gpu.made_before(path, {**facts, "gpu": "H100"})
    with pytest.raises(SystemExit, match=r"another version: .*2\.11\.0.*; choose"):
        gpu.made_before(path, {**facts, "versions": {"torch": "2.12.0"}})
    path.write_text("[]")
    with pytest.raises(SystemExit, match="no record of this benchmark"):
        gpu.made_before(path, facts)
