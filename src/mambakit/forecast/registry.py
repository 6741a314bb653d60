"""Where models live: folders on a disk, no server.

    <root>/AAPL/v1/{config.json, model.safetensors, scaler.json, metrics.json, metadata.json, README.md, *.png,
                    checksums.json}
    <root>/AAPL/aliases.json      {"production": "v1"}
    <root>/AAPL/.run/1/           checkpoints of a training that is under way or was killed

A version appears whole or not at all, is never written again, and is checked against its SHA-256 sums when it is read.
"""

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from mambakit.errors import ArtefactError
from mambakit.forecast.prices import parse_symbol
from mambakit.training.artefacts import (
    exclusive,
    read_json,
    remove_folder,
    remove_leftovers,
    verify_folder,
    write_folder,
    write_json,
)

PRODUCTION = "production"
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")


class ModelRegistry:
    """Stored versions of the models of many symbols, below one root folder; nothing is written before `store`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, symbol: str) -> Path:
        """Where a symbol's versions are; raises DataError for a symbol that is not one."""
        return self.root / parse_symbol(symbol)

    def versions(self, symbol: str) -> list[str]:
        """Names of the stored versions, oldest first."""
        folder = self.folder(symbol)
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return sorted((name for name in names if _VERSION.fullmatch(name)), key=_number)

    def require_writable(self, symbol: str) -> None:
        """Raise ArtefactError unless versions of the symbol can be stored; leaves no trace."""
        folder = self.folder(symbol)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ArtefactError(
                f"cannot write models to {folder}: {existing}: {error.strerror}; choose another folder with --out"
            ) from error

    def store(self, symbol: str, fill: Callable[[Path, str], None]) -> str:
        """Store what `fill(folder, version)` writes as the next version, make it production, and return its name."""
        folder = self.folder(symbol)
        remove_leftovers(folder)
        for number in itertools.count(len(self.versions(symbol)) + 1):
            version = f"v{number}"
            # Another training may store a version at any moment; whoever is second takes the next name.
            with suppress(FileExistsError):
                write_folder(folder / version, partial(_fill_named, fill, version))
                break
        if _number(self.aliases(symbol).get(PRODUCTION, "v0")) < number:  # a later one may have been quicker
            self.set_alias(symbol, PRODUCTION, version)
        return version

    def set_alias(self, symbol: str, alias: str, version: str) -> None:
        """Let an alias, such as production, stand for a version; raises ArtefactError where that is not stored."""
        if version not in self.versions(symbol):
            raise ArtefactError(f"{self.folder(symbol)} has no version {version}")
        write_json(self.folder(symbol) / "aliases.json", {**self.aliases(symbol), alias: version})

    def aliases(self, symbol: str) -> dict[str, str]:
        """Aliases and the versions they stand for."""
        path = self.folder(symbol) / "aliases.json"
        if not path.exists():
            return {}
        aliases = read_json(path)
        if not isinstance(aliases, dict) or not all(
            isinstance(version, str) and _VERSION.fullmatch(version) for version in aliases.values()
        ):
            raise ArtefactError(f'{path} is damaged: expected names and versions such as {{"{PRODUCTION}": "v1"}}')
        return aliases

    def find(self, symbol: str, version: str = PRODUCTION) -> Path:
        """The folder of a version, or of what an alias stands for, checked against its checksums.

        Raises ArtefactError where there is none, or where a file is missing or changed.
        """
        stored = self.versions(symbol)
        if not stored:
            raise ArtefactError(
                f"no model of {parse_symbol(symbol)} in {self.root}; "
                f"train one with: mambakit forecast train --symbols {parse_symbol(symbol)} --out {self.root}"
            )
        # A training killed after it stored its version may not have come to set the alias.
        name = self.aliases(symbol).get(version, stored[-1] if version == PRODUCTION else version)
        if name not in stored:
            raise ArtefactError(f"{self.folder(symbol)} has no version {version!r}; it has {', '.join(stored)}")
        path = self.folder(symbol) / name
        verify_folder(path)
        return path

    def interrupted(self, symbol: str) -> bool:
        """Whether a training of this symbol left checkpoints, being killed or still under way."""
        return any(self.folder(symbol).glob(".run/*/checkpoints/[0-9]*"))

    @contextmanager
    def run_folder(self, symbol: str) -> Iterator[Path]:
        """A folder for checkpoints that no other training uses meanwhile; removed when the block ends without error.

        The first free one is taken, so a later training of the same symbol finds what a killed one left.
        """
        folder = self.folder(symbol)
        with ExitStack() as stack:
            run = _take_run(folder / ".run", stack)
            try:
                yield run
                remove_folder(run)
            finally:
                # What holds no checkpoint is not worth resuming, and a folder made for nothing goes again.
                for path in (run / "checkpoints", run, run.parent, folder):
                    with suppress(OSError):
                        path.rmdir()


def _fill_named(fill: Callable[[Path, str], None], version: str, path: Path) -> None:
    fill(path, version)


def _number(version: str) -> int:
    return int(version[1:])


def _take_run(runs: Path, stack: ExitStack) -> Path:
    """The first folder in `runs` that no training holds; held until the stack closes."""
    for number in itertools.count(1):
        run = runs / str(number)
        try:
            stack.enter_context(exclusive(run))
        except ArtefactError:
            if not run.is_dir():  # not taken, but impossible to make
                raise
        else:
            break
    return run
