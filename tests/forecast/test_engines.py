"""Engines: what each job gives, that failures stay single, and that nothing depends on where a job runs."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mambakit.errors import DataError
from mambakit.forecast.engines import Engine, Event, Failure, HereEngine, ProcessEngine, Report, Success, reason_of


@dataclass(frozen=True)
class Toy:
    """A job that does what its symbol's first letter says."""

    symbol: str

    def run(self, report: Report | None, quiet: bool) -> Any:
        if report is not None:
            report({"epoch": 1, "validation_loss": 0.5})
        match self.symbol[0]:
            case "D":
                raise DataError(f"{self.symbol}: too\nfew days")
            case "B":
                raise KeyError("a defect")
            case "K":
                os.kill(os.getpid(), signal.SIGKILL)
            case "E":
                os._exit(7)
            case "T":
                return torch.get_num_threads()
        return f"{self.symbol} done"


def run(engine: Engine, *symbols: str) -> tuple[dict[str, Event], list[str]]:
    heard: list[str] = []
    events = list(engine.run([Toy(symbol) for symbol in symbols], lambda symbol, entry: heard.append(symbol)))
    assert len(events) == len(symbols)
    return {event.symbol: event for event in events}, heard


@pytest.mark.parametrize("engine", [HereEngine(quiet=True), ProcessEngine(2)])
def test_a_failing_job_stops_no_other(engine: Engine) -> None:
    events, _ = run(engine, "A", "D", "B", "C")
    assert [events[symbol].result for symbol in "AC"] == ["A done", "C done"]  # type: ignore[union-attr]
    assert isinstance(events["D"], Failure)
    assert events["D"].reason == "D: too few days"
    assert isinstance(events["B"], Failure)
    assert events["B"].reason.startswith("KeyError: 'a defect' at test_engines.py:")


def test_a_killed_process_is_one_failure_and_says_how_to_go_on() -> None:
    events, heard = run(ProcessEngine(2), "K", "E", "A1", "A2")
    assert isinstance(events["K"], Failure)
    assert "was ended by SIGKILL; was memory short?" in events["K"].reason
    assert "--resume" in events["K"].reason
    assert isinstance(events["E"], Failure)
    assert events["E"].reason.startswith("its process ended with code 7")
    assert isinstance(events["A1"], Success)
    assert isinstance(events["A2"], Success)
    assert sorted(heard) == ["A1", "A2", "E", "K"]


def test_processes_have_one_thread_each_and_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    events, _ = run(ProcessEngine(1), "T")
    assert events["T"].result == 1  # type: ignore[union-attr]
    assert os.environ["OMP_NUM_THREADS"] == "2"


@dataclass(frozen=True)
class Sleeper:
    """Says that it runs, and sleeps."""

    symbol: str
    folder: Path

    def run(self, report: Report | None, quiet: bool) -> None:
        (self.folder / self.symbol).write_text(str(os.getpid()))
        assert report is not None
        report({"epoch": 1})
        time.sleep(60)


def test_who_stops_listening_ends_the_processes(tmp_path: Path) -> None:
    def interrupt(symbol: str, entry: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ProcessEngine(1).run([Sleeper("A", tmp_path), Sleeper("B", tmp_path)], interrupt))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "A").read_text()), 0)
    assert not (tmp_path / "B").exists()


def test_memory_errors_say_what_to_make_smaller() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes")):
        assert "--batch-size" in reason_of(error)
