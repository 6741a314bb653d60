"""A Ray cluster to send tasks to: the one that an address names, or one started on this machine."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mambakit.errors import MambakitError

_SECONDS_TO_ANSWER = 5.0


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """The module ray, connected; what was connected here is let go of at the end.

    Args:
        address: of a running cluster, such as "auto" or "ray://host:10001"; "local" starts one on this machine, and
            None does where neither RAY_ADDRESS names a cluster nor one runs on this machine, which it then joins.

    Raises MambakitError where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise MambakitError("--engine ray needs Ray: pip install 'mambakit[ray]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        _connect(ray, address)
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    try:
        _require_answer(address)
        ray.init(address=address, log_to_driver=False, logging_level="error", include_dashboard=False)
    except OSError as error:  # ConnectionError among them
        raise MambakitError(f"no Ray cluster at {address!r}: start one with `ray start --head`") from error


def _require_answer(address: str | None) -> None:
    """Raise OSError where nothing listens at host:port; Ray itself would try for two minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
