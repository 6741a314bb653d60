"""Processes that find heavy libraries imported, which is most of what a command on a small model would take.

A server imports them once, and nothing of mambakit, and forks: each process is one of its own, with its own imports of
mambakit, its environment, its folder and its exit status. Whether the imports of a command are complete, only a process
that begins from nothing can tell: each room of the command line has tests with one.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

HEAVY = [
    *("numpy", "torch", "torch._dynamo", "pandas", "pyarrow.parquet", "scipy.stats", "sklearn.linear_model"),
    *(
        "statsmodels.api",
        "talib",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "accelerate",
        "rich",
        "typer",
    ),
]

_methods = multiprocessing.get_all_start_methods()
_processes = multiprocessing.get_context("forkserver" if "forkserver" in _methods else "spawn")
_processes.set_forkserver_preload(HEAVY)


def run_module(
    module: str, *arguments: str, cwd: Path | None, environment: Mapping[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """What `python -m module arguments` does."""
    return _run(_module, (module, arguments), cwd or Path.cwd(), environment, timeout)


def run_code(
    code: str, *, cwd: Path, environment: Mapping[str, str], timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """What `python -W error::UserWarning -c code` does."""
    return _run(_code, (code,), cwd, environment, timeout)


def _run(
    program: Callable[..., None], given: tuple[object, ...], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _processes.Process(target=_begin, args=(program, given, cwd, dict(environment), streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([program.__name__, *map(str, given)], timeout)
        assert process.exitcode is not None
        out, err = (path.read_text(encoding="utf-8") for path in streams)
        return subprocess.CompletedProcess(given, process.exitcode, out, err)


def _begin(
    program: Callable[..., None],
    given: tuple[object, ...],
    cwd: Path,
    environment: Mapping[str, str],
    streams: list[Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    program(*given)


def _module(module: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _code(code: str) -> None:
    sys.argv = ["-c"]
    warnings.simplefilter("error", UserWarning)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
