"""What a training run shows: on a terminal a bar with losses and time left, elsewhere about ten plain lines."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mambakit.training.record import EpochEntry, best_epoch

_LINES = 10
# A bar is drawn ten times a second; telling it more often only takes time from the training.
_SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """A context with a bar on a terminal: how far something is, its last result, and the time left.

    Args:
        console: where the bar is drawn.
        total, done: of all, and where it goes on from.
    """

    def __init__(self, description: str, total: int, done: int, quiet: bool, console: Console) -> None:
        self._description, self._quiet, self._console = description, quiet, console
        self._updated = time.monotonic()
        self._bar = Progress(
            # Descriptions are text, in which brackets are brackets and no markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, result="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advanced(self, completed: float) -> None:
        """So much is done; cheap to say often."""
        now = time.monotonic()
        if now - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._updated = now
            self._bar.update(self._task, completed=completed)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class EpochProgress(ProgressBar):
    """A context that shows the epochs of one run, from `done` to `epochs`."""

    def __init__(self, description: str, epochs: int, done: int, quiet: bool) -> None:
        super().__init__(description, epochs, done, quiet, Console())
        self._epochs, self._resumed_at = epochs, done
        self._started = self._updated

    def within_epoch(self, epoch: int, done: float) -> None:
        """Epoch `epoch` has come to the share `done` of its steps."""
        self.advanced(epoch - 1 + done)

    def epoch_ended(self, history: list[EpochEntry], finished: bool) -> None:
        """The last epoch in the history has ended, and with it the run if `finished`."""
        epoch = int(history[-1]["epoch"])
        losses = _losses(history)
        self._bar.update(self._task, completed=epoch, result=losses)
        if self._quiet or self._console.is_terminal:
            return
        if finished or epoch % max(1, self._epochs // _LINES) == 0:
            line = f"{self._description}: epoch {epoch}/{self._epochs}, {losses}, {self._time(epoch, finished)}"
            self._say(line)

    def _time(self, epoch: int, finished: bool) -> str:
        elapsed = time.monotonic() - self._started
        trained = epoch - self._resumed_at
        if finished:
            return f"took {_duration(elapsed)}" + (", stopped early" if epoch < self._epochs else "")
        if trained == 0:
            return "starting"
        return f"{_duration(elapsed / trained * (self._epochs - epoch))} left"


def _losses(history: list[EpochEntry]) -> str:
    last, best = history[-1], history[best_epoch(history)]
    trained = f"loss {last['train_loss']:.4g}, " if "train_loss" in last else ""
    return (
        f"{trained}validation {last['validation_loss']:.4g} (best {best['validation_loss']:.4g}, epoch {best['epoch']})"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
