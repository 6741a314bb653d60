"""Where the runs of a sweep are made: in this process, in several on this machine, or as tasks of a Ray cluster."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambakit.errors import MambakitError
from mambakit.lab.experiment import Experiment
from mambakit.lab.record import Member
from mambakit.training.artefacts import remove_folder, write_folder
from mambakit.training.ray_cluster import ray_cluster

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Job:
    """One run of a sweep; all of it plain, so that it travels.

    Attributes:
        folder: of its records; what a killed run left there is gone on with.
        experiment, members, preset, device: of `lab.run.run`.
    """

    folder: Path
    experiment: Experiment
    members: list[Member]
    preset: str | None
    device: str | None

    def make(self, folder: Path, quiet: bool) -> None:
        """Make the run, with its records in `folder`."""
        from mambakit.lab.run import run

        run(
            self.experiment,
            self.members,
            folder,
            preset=self.preset,
            device=self.device,
            resume=True,
            quiet=quiet,
        )


Ended = tuple[Job, str | None, float]
"""A job, why it failed (None where it did not), and the seconds that it took."""


def run_jobs(
    jobs: Sequence[Job], *, engine: str, workers: int, address: str | None, gpus: float, quiet: bool
) -> Iterator[Ended]:
    """Make all of them, and tell of each when it ends; arguments as in `lab.sweep.sweep`."""
    if engine == "ray":
        yield from _on_ray(jobs, address, gpus)
    elif workers == 1:
        for job in jobs:
            yield job, *_made(job, job.folder, quiet)
    else:
        yield from _in_processes(jobs, workers)


def _made(job: Job, folder: Path, quiet: bool) -> tuple[str | None, float]:
    """Make a job; errors are told, not raised, so that the others go on."""
    started = time.perf_counter()
    try:
        job.make(folder, quiet)
    except Exception as error:
        kind = "" if isinstance(error, MambakitError) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split()), time.perf_counter() - started
    return None, time.perf_counter() - started


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[Ended]:
    import multiprocessing
    import os

    threads = max(1, (os.cpu_count() or 1) // workers)
    spawned = multiprocessing.get_context("spawn")  # a forked child can't use CUDA, and may hang in OpenMP
    with ProcessPoolExecutor(workers, mp_context=spawned, initializer=_share_cores, initargs=(threads,)) as pool:
        pending: dict[Future[tuple[str | None, float]], Job] = {
            pool.submit(_made, job, job.folder, True): job for job in jobs
        }
        try:
            while pending:
                ended, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = pending.pop(future)
                    try:
                        reason, seconds = future.result()
                    except BrokenProcessPool:
                        reason, seconds = "its process was killed; the sweep run again goes on with it", 0.0
                    yield job, reason, seconds
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
                files, reason, seconds = ray.get(ended)
            except ray.exceptions.RayError as error:
                files, reason, seconds = {}, f"its node or process was lost ({type(error).__name__})", 0.0
            if reason is None:
                _store(job.folder, files)
            yield job, reason, seconds


def _made_elsewhere(job: Job) -> tuple[dict[str, bytes], str | None, float]:
    """What a Ray task does: the files of a run, by name."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        reason, seconds = _made(job, folder, True)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if not reason else {}
    return files, reason, seconds


def _store(folder: Path, files: dict[str, Any]) -> None:
    def fill(made: Path) -> None:
        for name, content in files.items():
            (made / name).write_bytes(content)

    if folder.exists():  # a run killed under the local engine, made anew on a node that has not seen it
        remove_folder(folder)
    write_folder(folder, fill)
