"""A line of progress for a run: a bar on a terminal, a line for every tenth elsewhere, nothing when quiet."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINES = 10
_SECONDS_BETWEEN_UPDATES = 0.1


class RunProgress:
    """A context that shows the steps of a run.

    Args:
        description: of the run.
        steps, done: of all, and where it goes on from.
    """

    def __init__(self, description: str, steps: int, done: int, quiet: bool) -> None:
        self._description, self._steps, self._quiet = description, steps, quiet
        self._console = Console(stderr=True)
        self._updated, self._told = 0.0, done * _LINES // max(1, steps)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=steps, completed=done, result="")

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stepped(self, step: int) -> None:
        """`step` steps are taken."""
        now = time.monotonic()
        if now - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._updated = now
            self._bar.update(self._task, completed=step)

    def evaluated(self, step: int, result: str) -> None:
        """After `step` steps an evaluation found `result`."""
        self._bar.update(self._task, completed=step, result=result)
        tenth = step * _LINES // max(1, self._steps)
        if self._quiet or self._console.is_terminal or tenth == self._told:
            return
        self._told = tenth
        line = f"{self._description}: step {step}/{self._steps}, {result}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
