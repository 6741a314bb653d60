"""One run in several processes, as `accelerate launch` and torchrun start them: who writes, and what the others know.

Every process does the same work up to `mambakit.training.fit`, which shares it; files and messages are for the first.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")


def processes() -> int:
    """How many processes run this together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def decided_by_first(decide: Callable[[], Value]) -> Value:
    """What `decide()` gives in the first process, in all of them; the others wait and do not call it."""
    if processes() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    _joined()
    values = [decide() if is_first() else None]
    broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


@contextmanager
def held_by_first(context: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
    """A context that the first process enters and leaves, last of all, and whose value all have."""
    if processes() == 1:
        with context() as value:
            yield value
        return
    if is_first():
        with context() as value:
            yield decided_by_first(lambda: value)
            _joined().wait_for_everyone()
    else:
        yield decided_by_first(_not_called)
        _joined().wait_for_everyone()


def _joined() -> "PartialState":
    """The processes' common ground, made as `fit` makes it if that was not called yet."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _not_called() -> Any:
    raise AssertionError("only the first process decides")
