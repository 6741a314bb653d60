"""Where the trainings of many symbols run: here, in processes of this machine, or on a Ray cluster.

An engine takes jobs, one for each symbol, and gives back what became of each as it is known. A job that fails, or whose
process is killed, is a failure with a reason and never stops the others. What a job gives does not depend on the
engine: each trains on one thread, from its own seed and data alone.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from mambakit.errors import MambakitError
from mambakit.training.record import EpochEntry

EPOCH, DONE, FAILED = "epoch", "done", "failed"

Report = Callable[[EpochEntry], None]
"""Takes the entry of an epoch, see `mambakit.training.record`."""

OnEpoch = Callable[[str, EpochEntry], None]
"""Takes a symbol and the entry of one of its epochs."""


class Job(Protocol):
    """One symbol's work; it must survive pickling, and so must its result."""

    @property
    def symbol(self) -> str: ...

    def run(self, report: Report | None, quiet: bool) -> Any:
        """Do the work, telling of each epoch where somebody wants to know."""


@dataclass(frozen=True)
class Success:
    """A job that was done."""

    symbol: str
    result: Any
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A job that was not."""

    symbol: str
    reason: str  # one line
    seconds: float


Event = Success | Failure


class Engine(Protocol):
    """Runs jobs."""

    @property
    def sees_our_disk(self) -> bool:
        """Whether a job can write to a folder of this machine."""

    def run(self, jobs: Sequence[Job], on_epoch: OnEpoch) -> Iterator[Event]:
        """What became of each job, in the order in which they end; `on_epoch` hears of epochs, by symbol."""


@dataclass(frozen=True)
class HereEngine:
    """One job after the other in this process, each with its own progress bar."""

    quiet: bool = False

    @property
    def sees_our_disk(self) -> bool:
        return True

    def run(self, jobs: Sequence[Job], on_epoch: OnEpoch) -> Iterator[Event]:
        """See `Engine`; a keyboard interrupt ends the run."""
        for job in jobs:
            started = time.perf_counter()
            try:
                result = job.run(None, self.quiet)
            except Exception as error:
                yield Failure(job.symbol, reason_of(error), time.perf_counter() - started)
            else:
                yield Success(job.symbol, result, time.perf_counter() - started)


@dataclass(frozen=True)
class ProcessEngine:
    """So many jobs at once, each in a process of its own, so that the death of one takes nothing else with it."""

    processes: int

    @property
    def sees_our_disk(self) -> bool:
        return True

    def run(self, jobs: Sequence[Job], on_epoch: OnEpoch) -> Iterator[Event]:
        """See `Engine`; an interrupt of this process ends the others as well, their checkpoints stay."""
        waiting, running = deque(jobs), dict[Connection, _Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.processes:
                    started = _start(waiting.popleft())
                    running[started.connection] = started
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    ended = _hear(running[ready], on_epoch)
                    if ended is not None:
                        running.pop(ready).close()
                        yield ended
        finally:
            for left in running.values():
                left.process.terminate()
            for left in running.values():
                left.close()


@dataclass(frozen=True)
class _Running:
    job: Job
    process: BaseProcess
    connection: Connection
    started: float

    def close(self) -> None:
        self.process.join()
        self.connection.close()


def _start(job: Job) -> _Running:
    # Spawned, not forked: a fork of a process whose threads hold locks can hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, theirs), name=f"mambakit-{job.symbol}", daemon=True)
    with _one_thread_for_children():
        process.start()
    theirs.close()  # so that the pipe ends when the process does
    return _Running(job, process, ours, time.perf_counter())


class _one_thread_for_children:
    """Processes started inside begin with one OpenMP thread, which torch can't take back once its pool is made."""

    def __enter__(self) -> None:
        self.before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = self.before


def _hear(running: _Running, on_epoch: OnEpoch) -> Event | None:
    """One message of a process, or its end without one."""
    symbol = running.job.symbol
    try:
        kind, content = running.connection.recv()
    except EOFError:
        running.process.join()
        return Failure(symbol, _death(running.process.exitcode), time.perf_counter() - running.started)
    if kind == EPOCH:
        on_epoch(symbol, content)
        return None
    seconds = time.perf_counter() - running.started
    return Success(symbol, content, seconds) if kind == DONE else Failure(symbol, content, seconds)


def _work(job: Job, connection: Connection) -> None:
    """What a process does: the job, telling of it through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its processes
    try:
        result = job.run(lambda entry: connection.send((EPOCH, dict(entry))), True)
    except Exception as error:
        connection.send((FAILED, reason_of(error)))
    else:
        connection.send((DONE, result))
    connection.close()


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; was memory short? try a smaller --parallel or --batch-size" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}; go on with --resume"
    return f"its process ended with code {exit_code}; go on with --resume"


def reason_of(error: BaseException) -> str:
    """An error in one line; where it is not one of ours, with its type and the place where it arose."""
    if isinstance(error, MambakitError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory; try a smaller --parallel, --batch-size or --d-model, or --accumulate"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def default_processes(jobs: int) -> int:
    """As many as there are jobs, and cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(jobs, cores))
