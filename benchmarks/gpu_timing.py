"""How long a call takes on a GPU, told twice: as a single call sees it, and with the host out of the way.

A single call begins when the device has nothing else to do, so what the host needs to launch it counts. Between many
calls that follow each other the host runs ahead: with its launches queued behind something longer, the time is that of
the kernels alone.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CACHE = 256 << 20  # bytes written before each run, so that none finds its inputs in the cache
_LEAST, _MOST = 1, 100  # runs of a turn
_LONGEST_WAIT = 0.3  # seconds that the device is kept busy while a call is queued
_AHEAD = 1.5  # how much longer that is than the host needs


class Samples(NamedTuple):
    """Times in ms of runs of one call."""

    single: list[float]
    device: list[float]


class Pace(NamedTuple):
    """Seconds that a call takes the host, and until the device is done."""

    host: float
    whole: float


def measure(calls: Mapping[str, Callable[[], Any]], once: set[str], turns: int, budget: float) -> dict[str, Any]:
    """Medians of calls that take turns, and why those that failed did.

    Args:
        calls: by contender.
        once: contenders so slow that a single run, without one to warm up, has to do.
        turns: of each.
        budget: ms for one turn of one call.
    """
    found: dict[str, Samples] = {name: Samples([], []) for name in calls}
    paces: dict[str, Pace] = {}
    failed: dict[str, str] = {}
    for turn in range(turns):
        for name, call in calls.items():
            if name in failed or (name in once and turn > 0):
                continue
            try:
                if name not in once and name not in paces:
                    paces[name] = warm_up(call)
                samples = Samples(_runs(call, 1), []) if name in once else take(call, budget, paces[name])
            except Exception as error:  # a peer that fails must not end the run
                failed[name] = reason(error)
                continue
            found[name].single.extend(samples.single)
            found[name].device.extend(samples.device)
    timed = {name: samples for name, samples in found.items() if samples.single and name not in failed}
    device = {name: samples.device for name, samples in timed.items() if samples.device}
    return {
        "milliseconds": {name: statistics.median(samples.single) for name, samples in timed.items()},
        "device_milliseconds": {name: statistics.median(times) for name, times in device.items()},
        "spread": {name: _spread(samples.single) for name, samples in timed.items()},
        "failed": failed,
    }


def warm_up(call: Callable[[], Any]) -> Pace:
    """Let a call compile what it needs, and see how long the next one takes."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return Pace(host, time.perf_counter() - start)


def take(call: Callable[[], Any], budget: float, pace: Pace) -> Samples:
    """One turn: half of the `budget` for single calls, half for queued ones."""
    wait = min(_AHEAD * pace.host, _LONGEST_WAIT)
    return Samples(
        _runs(call, _count(budget / 2, pace.whole)),
        _runs(call, _count(budget / 2, pace.whole + wait), wait),
    )


def _count(budget: float, seconds: float) -> int:
    return max(_LEAST, min(_MOST, int(budget / (1e3 * seconds + 0.1))))


def _runs(call: Callable[[], Any], count: int, wait: float = 0.0) -> list[float]:
    """Times between events around the call, which is queued while the device is kept busy for `wait` seconds."""
    flush = torch.empty(_CACHE, dtype=torch.int8, device="cuda")
    cycles = int(wait * _clock())

    def once() -> float:
        flush.zero_()
        if cycles:
            torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return [once() for _ in range(count)]


def _clock() -> float:
    """Cycles of a second, as the device's own waiting counts them."""
    from triton.runtime import driver

    return 1e3 * driver.active.utils.get_device_properties(torch.cuda.current_device())["sm_clock_rate"]


def _spread(times: list[float]) -> float:
    return (max(times) - min(times)) / statistics.median(times)


def copy_rate() -> float:
    """Bytes a second of a copy of a gigabyte, read and written."""
    source, target = torch.randint(-128, 127, (2, 1 << 30), dtype=torch.int8, device="cuda").unbind()
    return 2 * 2**30 / (1e-3 * statistics.median(_runs(lambda: target.copy_(source), 30)))


def product_rate() -> float:
    """Operations a second of a bfloat16 product of two 8192 x 8192 matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    out: Tensor = a @ b
    return 2 * 8192**3 / (1e-3 * statistics.median(_runs(lambda: torch.mm(a, b, out=out), 30)))


def exponential_rate(a_clock: int = 16) -> float:
    """Exponentials a second, from so many `a_clock` of each multiprocessor."""
    return a_clock * torch.cuda.get_device_properties("cuda").multi_processor_count * _clock()


def reason(error: Exception) -> str:
    """One line on why a contender is not measured."""
    first = (str(error).splitlines() or [""])[0][:120]
    if isinstance(error, ImportError):
        return f"absent ({first})"
    return f"{type(error).__name__}: {first}"
