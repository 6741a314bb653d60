"""Trainings on a Ray cluster: one task a symbol, tried again elsewhere where its node is lost.

Nodes need not share a disk: a task gives its result back, and the machine that asked stores it. Needs the extra
`mambakit[ray]`, and mambakit on every node.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mambakit.forecast.engines import DONE, FAILED, Event, Failure, Job, OnEpoch, Success, reason_of
from mambakit.training.ray_cluster import ray_cluster


@dataclass(frozen=True)
class RayEngine:
    """Jobs as Ray tasks, a core (and share of a GPU) each.

    Args:
        address: of `ray_cluster`: that of a running cluster, "local", or None.
        num_gpus: share of a GPU that a task gets to itself.
        retries: how often a task is started again whose node or process was lost.
    """

    address: str | None = None
    num_gpus: float = 0.0
    retries: int = 3

    @property
    def sees_our_disk(self) -> bool:
        return False

    def run(self, jobs: Sequence[Job], on_epoch: OnEpoch) -> Iterator[Event]:
        """See `mambakit.forecast.engines.Engine`; epochs are not heard of."""
        with ray_cluster(self.address) as ray:
            task = ray.remote(num_cpus=1, num_gpus=self.num_gpus, max_retries=self.retries)(_work)
            started = time.perf_counter()
            symbols = {task.remote(job): job.symbol for job in jobs}
            while symbols:
                (ended,), _ = ray.wait(list(symbols), num_returns=1)
                yield _event(ray, ended, symbols.pop(ended), started)


def _event(ray: Any, ended: Any, symbol: str, started: float) -> Event:
    try:
        kind, content, seconds = ray.get(ended)
    except ray.exceptions.RayError as error:
        lost = f"its node or process was lost, and so were all retries ({type(error).__name__})"
        return Failure(symbol, lost, time.perf_counter() - started)
    return Success(symbol, content, seconds) if kind == DONE else Failure(symbol, content, seconds)


def _work(job: Job) -> tuple[str, Any, float]:
    """What a task does; errors of the job itself are no reason to try again, and so are results."""
    started = time.perf_counter()
    try:
        kind, content = DONE, job.run(None, True)
    except Exception as error:
        kind, content = FAILED, reason_of(error)
    return kind, content, time.perf_counter() - started
