"""A line of progress for a run: a bar on a terminal, a line for every tenth elsewhere, nothing when quiet."""

from rich.console import Console

from mambakit.training.progress import ProgressBar

_LINES = 10


class RunProgress(ProgressBar):
    """A context that shows the steps of a run.

    Args:
        description: of the run.
        steps, done: of all, and where it goes on from.
    """

    def __init__(self, description: str, steps: int, done: int, quiet: bool) -> None:
        super().__init__(description, steps, done, quiet, Console(stderr=True))
        self._steps, self._told = steps, done * _LINES // max(1, steps)

    def evaluated(self, step: int, result: str) -> None:
        """After `step` steps an evaluation found `result`."""
        self._bar.update(self._task, completed=step, result=result)
        tenth = step * _LINES // max(1, self._steps)
        if self._quiet or self._console.is_terminal or tenth == self._told:
            return
        self._told = tenth
        self._say(f"{self._description}: step {step}/{self._steps}, {result}")
