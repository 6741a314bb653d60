"""What the training of many symbols at once shows: a bar for each that runs, a line for each that ended."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mambakit.forecast.engines import Event, Failure
from mambakit.training.record import EpochEntry


class SymbolsProgress:
    """A context that hears of epochs and of symbols that ended.

    Args:
        symbols: how many there are.
        epochs: of each, at most.
    """

    def __init__(self, symbols: int, epochs: int, quiet: bool) -> None:
        self._symbols = symbols
        self._epochs = epochs
        self._quiet = quiet
        self._console = Console()
        self._ended = 0
        self._started = time.monotonic()
        self._running: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._all = self._bars.add_task("all symbols", total=symbols, told="")

    def __enter__(self) -> "SymbolsProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def epoch(self, symbol: str, entry: EpochEntry) -> None:
        """A symbol has ended an epoch."""
        if symbol not in self._running:
            self._running[symbol] = self._bars.add_task(symbol, total=self._epochs, told="")
        told = f"validation {entry['validation_loss']:.4g}"
        self._bars.update(self._running[symbol], completed=entry["epoch"], told=told)

    def ended(self, event: Event) -> None:
        """A symbol was trained, or failed."""
        self._ended += 1
        if event.symbol in self._running:
            self._bars.remove_task(self._running.pop(event.symbol))
        self._bars.update(self._all, completed=self._ended)
        if self._quiet:
            return
        state = f"failed: {event.reason}" if isinstance(event, Failure) else f"trained in {event.seconds:.1f} s"
        left = (time.monotonic() - self._started) / self._ended * (self._symbols - self._ended)
        rest = f", about {left:.0f} s left" if self._ended < self._symbols else ""
        line = f"{event.symbol}: {state} ({self._ended} of {self._symbols}{rest})"
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
