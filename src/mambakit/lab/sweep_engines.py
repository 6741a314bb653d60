"""Where the runs of a sweep are made: in this process, in several on this machine, or as tasks of a Ray cluster.

Processes that share a GPU take turns on it; so there, several runs at once are threads of one process, each with a
stream, and kernels of one fill what those of another leave idle.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import MambakitError
from mambakit.lab.experiment import Experiment
from mambakit.lab.record import Member
from mambakit.lab.watch import OutOfTime
from mambakit.training.artefacts import remove_folder, write_folder
from mambakit.training.ray_cluster import ray_cluster

ENGINES = ("local", "ray")
_SWITCHING = 2e-4  # seconds: a launch waits for threads that are busy with Python no longer than a step takes


@dataclass(frozen=True)
class Job:
    """One run of a sweep; all of it plain, so that it travels.

    Attributes:
        folder: of its records; what a killed run left there is gone on with.
        experiment, members, preset, device, capture, tf32, deadline: of `lab.run.run`.
    """

    folder: Path
    experiment: Experiment
    members: list[Member]
    preset: str | None
    device: str | None = None
    capture: bool = False
    tf32: bool = False
    deadline: float | None = None

    def make(self, folder: Path, quiet: bool) -> None:
        """Make the run, with its records in `folder`."""
        from mambakit.lab.run import run

        run(
            self.experiment,
            self.members,
            folder,
            preset=self.preset,
            device=self.device,
            capture=self.capture,
            tf32=self.tf32,
            resume=True,
            deadline=self.deadline,
            quiet=quiet,
        )


@dataclass(frozen=True)
class Ended:
    """What became of a job.

    Attributes:
        reason: why it is not done; None where it is.
        aside: whether there was no time for it, which is no failure.
        seconds: that it took.
    """

    job: Job
    reason: str | None
    aside: bool
    seconds: float


def run_jobs(
    jobs: Sequence[Job], *, engine: str, workers: int, address: str | None, gpus: float, quiet: bool
) -> Iterator[Ended]:
    """Make all of them, and tell of each when it ends; arguments as in `lab.sweep.sweep`."""
    if engine == "ray":
        yield from _on_ray(jobs, address, gpus)
    elif workers == 1:
        for job in jobs:
            yield _made(job, job.folder, quiet)
    elif _on_gpu(jobs):
        switching = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCHING)
        try:
            with ThreadPoolExecutor(workers) as pool:
                yield from _as_they_end(pool, _made_beside_others, jobs)
        finally:
            sys.setswitchinterval(switching)
    else:
        yield from _in_processes(jobs, workers)


def _on_gpu(jobs: Sequence[Job]) -> bool:
    from mambakit.lab.experiment import device_named

    return any(device_named(job.device).type == "cuda" for job in jobs)


def _made(job: Job, folder: Path, quiet: bool) -> Ended:
    """Make a job; errors are told, not raised, so that the others go on."""
    started = time.perf_counter()
    reason, aside = None, False
    try:
        if job.deadline is not None and time.monotonic() >= job.deadline:
            raise OutOfTime("put aside: there is no time left for it")
        job.make(folder, quiet)
    except Exception as error:
        aside = isinstance(error, OutOfTime)
        kind = "" if isinstance(error, MambakitError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())
    return Ended(job, reason, aside, time.perf_counter() - started)


def _made_beside_others(job: Job) -> Ended:
    """Make a job on a stream of its own."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        return _made(job, job.folder, True)


def _made_quietly(job: Job) -> Ended:
    return _made(job, job.folder, True)


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Ended]:
    import multiprocessing
    import os

    threads = max(1, (os.cpu_count() or 1) // workers)
    spawned = multiprocessing.get_context("spawn")  # a forked child can't use CUDA, and may hang in OpenMP
    with ProcessPoolExecutor(workers, mp_context=spawned, initializer=_share_cores, initargs=(threads,)) as pool:
        yield from _as_they_end(pool, _made_quietly, jobs)


def _as_they_end(pool: Executor, make: Callable[[Job], Ended], jobs: Sequence[Job]) -> Iterator[Ended]:
    pending: dict[Future[Ended], Job] = {pool.submit(make, job): job for job in jobs}
    try:
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                job = pending.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield Ended(job, "its process was killed; the sweep run again goes on with it", False, 0.0)
    finally:
        pool.shutdown(cancel_futures=True)


def _share_cores(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _on_ray(jobs: Sequence[Job], address: str | None, gpus: float) -> Iterator[Ended]:
    with ray_cluster(address) as ray:
        task = ray.remote(num_cpus=1, num_gpus=gpus)(_made_elsewhere)
        pending = {task.remote(job): job for job in jobs}
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(ended)
            try:
                files, made = ray.get(ended)
            except ray.exceptions.RayError as error:
                files, made = {}, Ended(job, f"its node or process was lost ({type(error).__name__})", False, 0.0)
            if made.reason is None:
                _store(job.folder, files)
            yield made


def _made_elsewhere(job: Job) -> tuple[dict[str, bytes], Ended]:
    """What a Ray task does: the files of a run, by name, and what became of it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        ended = _made(job, folder, True)
        done = [] if ended.reason else [path for path in folder.iterdir() if path.is_file()]
        return {path.name: path.read_bytes() for path in done}, ended


def _store(folder: Path, files: dict[str, Any]) -> None:
    def fill(made: Path) -> None:
        for name, content in files.items():
            (made / name).write_bytes(content)

    if folder.exists():  # a run killed under the local engine, made anew on a node that has not seen it
        remove_folder(folder)
    write_folder(folder, fill)
