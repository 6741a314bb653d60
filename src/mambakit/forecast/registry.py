"""Where models live: folders on a disk, no server.

    <root>/AAPL/v1/{config.json, model.safetensors, scaler.json, metrics.json, metadata.json, README.md, *.png,
                    checksums.json}
    <root>/AAPL/aliases.json      {"production": "v2", "challenger": "v3", "history": [..]}
    <root>/AAPL/.run/1/           checkpoints of a training that is under way or was killed

A version appears whole or not at all, is never written again, and is checked against its SHA-256 sums when it is read.
Its name is never given to another one, even after it is deleted. `production` is the version that serves, `challenger`
the one that is tried beside it; the history holds what was production before, so that a promotion can be taken back.
Processes that change aliases of one symbol at the same time take turns, so that none undoes what another did.
"""

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from mambakit.errors import ArtefactError, DataError
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
CHALLENGER = "challenger"
ALIASES = (PRODUCTION, CHALLENGER)
_HISTORY, _NEWEST = "history", "newest"  # what aliases.json holds beside aliases
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")
_PATIENCE = 30.0  # seconds to wait for another process that changes the same aliases, which takes milliseconds


@dataclass(frozen=True)
class StoredVersion:
    """One stored version at a glance; what can't be read of it is None."""

    symbol: str
    version: str
    aliases: tuple[str, ...]
    trained: str | None  # ISO date and time
    data_until: str | None  # the last day of its data
    validation_loss: float | None
    bytes: int
    problem: str | None  # what is wrong with its files


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

    def store(self, symbol: str, fill: Callable[[Path, str], None], alias: str | None = PRODUCTION) -> str:
        """Store what `fill(folder, version)` writes as the next version, and return its name.

        Args:
            alias: what the version becomes: production, challenger, or neither (None). The first version of a symbol
                becomes production in any case: there is nothing yet to challenge.
        """
        if alias is not None:
            _require_alias(alias)
        folder = self.folder(symbol)
        remove_leftovers(folder)
        for number in itertools.count(self._next_number(symbol)):
            version = f"v{number}"
            # Another training may store a version at any moment; whoever is second takes the next name.
            with suppress(FileExistsError):
                write_folder(folder / version, partial(_fill_named, fill, version))
                break
        with self._changing(symbol) as state:
            if PRODUCTION not in state.aliases:
                _appoint(state, version)
            elif alias == CHALLENGER:
                state.aliases[CHALLENGER] = version
            elif alias == PRODUCTION and _number(state.aliases[PRODUCTION]) < number:
                _appoint(state, version)  # unless a later one was quicker
        return version

    def set_alias(self, symbol: str, alias: str, version: str) -> None:
        """Let an alias, production or challenger, stand for a version.

        Raises DataError for another alias, ArtefactError where the version is not stored.
        """
        _require_alias(alias)
        with self._changing(symbol) as state:
            self._require_stored(symbol, version)
            if alias == PRODUCTION:
                _appoint(state, version)
            else:
                state.aliases[alias] = version

    def promote(self, symbol: str, version: str = CHALLENGER) -> tuple[str | None, str]:
        """Make a version, by default the challenger, production; return what was production and what is now.

        The version is checked against its checksums first. Raises ArtefactError where it is damaged or not stored.
        """
        promoted = self.find(symbol, version).name
        with self._changing(symbol) as state:
            self._require_stored(symbol, promoted)
            before = state.aliases.get(PRODUCTION)
            _appoint(state, promoted)
        return before, promoted

    def roll_back(self, symbol: str) -> tuple[str, str]:
        """Make production again what was so before; return what was production and what is now.

        Raises ArtefactError where there was nothing before, or where it is damaged.
        """
        with self._changing(symbol) as state:
            if not state.history:
                raise ArtefactError(
                    f"{parse_symbol(symbol)} has no earlier production to go back to; "
                    f"choose a version with: mambakit forecast models promote {parse_symbol(symbol)} VERSION"
                )
            before, back = state.aliases[PRODUCTION], state.history[-1]["version"]
            verify_folder(self.folder(symbol) / back)
            state.history.pop()
            state.aliases[PRODUCTION] = back
            if state.aliases.get(CHALLENGER) == back:
                del state.aliases[CHALLENGER]
        return before, back

    def challenge(self, symbol: str, version: str | None) -> None:
        """Let a version, which is not production, be the challenger; None withdraws the present one.

        Raises ArtefactError where the version is damaged, not stored, or production, or there is none to withdraw.
        """
        challenger = None if version is None else self.find(symbol, version).name
        with self._changing(symbol) as state:
            if challenger is None:
                if state.aliases.pop(CHALLENGER, None) is None:
                    raise ArtefactError(f"{parse_symbol(symbol)} has no challenger to withdraw")
                return
            self._require_stored(symbol, challenger)
            if state.aliases.get(PRODUCTION, challenger) == challenger:
                raise ArtefactError(
                    f"{parse_symbol(symbol)} {challenger} is production and can't challenge itself; "
                    f"stored are {', '.join(self.versions(symbol))}"
                )
            state.aliases[CHALLENGER] = challenger

    def delete(self, symbol: str, version: str, even_if_used: bool = False) -> str | None:
        """Delete a version, whole or not at all; return what is production afterwards.

        Args:
            even_if_used: also where an alias stands for it. Production goes back to what it was before, or, without
                such, to the newest version left.

        Raises:
            ArtefactError: the version is not stored, or is in use.
        """
        with self._changing(symbol) as state:
            self._require_stored(symbol, version)
            used = [alias for alias, name in state.aliases.items() if name == version]
            if used and not even_if_used:
                raise ArtefactError(
                    f"{parse_symbol(symbol)} {version} is {' and '.join(used)}; "
                    "promote another version first, or say --force"
                )
            left = [name for name in self.versions(symbol) if name != version]
            for alias in used:
                del state.aliases[alias]
            state.history[:] = [entry for entry in state.history if entry["version"] != version]
            if PRODUCTION in used and left:
                state.aliases[PRODUCTION] = state.history.pop()["version"] if state.history else left[-1]
                if state.aliases.get(CHALLENGER) == state.aliases[PRODUCTION]:
                    del state.aliases[CHALLENGER]
            state.newest = max(state.newest, *map(_number, self.versions(symbol)))
            production = state.aliases.get(PRODUCTION)
        # The aliases first: killed here, the version is only nobody's.
        with suppress(FileNotFoundError):
            remove_folder(self.folder(symbol) / version)
        return production

    def symbols(self) -> list[str]:
        """The symbols that have a stored version."""
        folders = [path.name for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        return sorted(name for name in folders if _is_symbol(name) and self.versions(name))

    def stored(self, symbol: str | None = None) -> list[StoredVersion]:
        """Every stored version of a symbol, or of all, each checked against its checksums."""
        return [
            self._describe(each, version)
            for each in (self.symbols() if symbol is None else [parse_symbol(symbol)])
            for version in self.versions(each)
        ]

    def verify(self, symbol: str | None = None) -> list[str]:
        """What is wrong with the versions and aliases of a symbol, or of all, in one sentence each; empty if nothing.

        Raises ArtefactError where a symbol is named that has none.
        """
        if symbol is not None and not self.versions(symbol):
            raise self._no_model(symbol)
        problems = [each.problem for each in self.stored(symbol) if each.problem is not None]
        for each in self.symbols() if symbol is None else [parse_symbol(symbol)]:
            try:
                missing = set(self.aliases(each).items())
            except ArtefactError as error:
                problems.append(str(error))
                continue
            problems += [
                f"{self.folder(each) / 'aliases.json'}: {alias} is {version}, which is not stored; "
                f"choose another with: mambakit forecast models promote {each} VERSION"
                for alias, version in sorted(missing)
                if version not in self.versions(each)
            ]
        return problems

    def aliases(self, symbol: str) -> dict[str, str]:
        """Aliases and the versions they stand for."""
        return self._state(symbol).aliases

    def history(self, symbol: str) -> list[dict[str, str]]:
        """What was production before, {"version": "v1", "until": "2026-01-31T17:05:00+00:00"}, the latest last."""
        return self._state(symbol).history

    def find(self, symbol: str, version: str = PRODUCTION) -> Path:
        """The folder of a version, or of what an alias stands for, checked against its checksums.

        Raises ArtefactError where there is none, or where a file is missing or changed.
        """
        path = self.folder(symbol) / self.resolve(symbol, version)
        verify_folder(path)
        return path

    def resolve(self, symbol: str, version: str = PRODUCTION) -> str:
        """The name of a version, or of what an alias stands for; raises ArtefactError where there is none."""
        stored = self.versions(symbol)
        if not stored:
            raise self._no_model(symbol)
        # A training killed after it stored its version may not have come to set the alias.
        name = self.aliases(symbol).get(version, stored[-1] if version == PRODUCTION else version)
        if name == CHALLENGER:
            raise ArtefactError(
                f"{self.folder(symbol)} has no challenger; "
                f"choose one with: mambakit forecast models challenge {parse_symbol(symbol)} VERSION"
            )
        self._require_stored(symbol, name)
        return name

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

    def _next_number(self, symbol: str) -> int:
        # The versions first: one deleted in between has left its number in the state by then.
        numbers = [_number(version) for version in self.versions(symbol)]
        return max([*numbers, self._state(symbol).newest]) + 1

    def _require_stored(self, symbol: str, version: str) -> None:
        stored = self.versions(symbol)
        if version not in stored:
            raise ArtefactError(f"{self.folder(symbol)} has no version {version!r}; it has {', '.join(stored)}")

    def _no_model(self, symbol: str) -> ArtefactError:
        return ArtefactError(
            f"no model of {parse_symbol(symbol)} in {self.root}; "
            f"train one with: mambakit forecast train --symbols {parse_symbol(symbol)} --out {self.root}"
        )

    def _describe(self, symbol: str, version: str) -> StoredVersion:
        folder = self.folder(symbol) / version
        problem, metadata = None, {}
        aliases: tuple[str, ...] = ()
        try:
            verify_folder(folder)
        except ArtefactError as error:
            problem = str(error)
        with suppress(ArtefactError):
            metadata = read_json(folder / "metadata.json")
        with suppress(ArtefactError):
            aliases = tuple(alias for alias, name in self.aliases(symbol).items() if name == version)
        return StoredVersion(
            symbol,
            version,
            aliases,
            _nested(metadata, "training_date"),
            _nested(metadata, "data_stats", "last_day"),
            _nested(metadata, "performance_metrics", "best_val_loss"),
            sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            problem,
        )

    def _state(self, symbol: str) -> "_State":
        path = self.folder(symbol) / "aliases.json"
        content = read_json(path) if path.exists() else {}
        try:
            aliases = {name: version for name, version in content.items() if name not in (_HISTORY, _NEWEST)}
            state = _State(aliases, content.get(_HISTORY, []), content.get(_NEWEST, 0))
            names = [*state.aliases.values(), *(entry["version"] for entry in state.history)]
            if not all(_VERSION.fullmatch(name) for name in names) or not isinstance(state.newest, int):
                raise ValueError(names)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ArtefactError(
                f'{path} is damaged: expected names and versions such as {{"{PRODUCTION}": "v1"}}; '
                "remove it, and the newest version is production"
            ) from error
        return state

    @contextmanager
    def _changing(self, symbol: str) -> Iterator["_State"]:
        """The aliases to change in place, written when the block ends without error; others wait until then."""
        folder = self.folder(symbol)
        if not self.versions(symbol):
            raise self._no_model(symbol)
        with exclusive(folder, wait=_PATIENCE):
            state = self._state(symbol)
            before = _as_json(state)
            yield state
            if _as_json(state) != before:
                write_json(folder / "aliases.json", _as_json(state))


@dataclass
class _State:
    """The content of aliases.json."""

    aliases: dict[str, str]
    history: list[dict[str, str]]
    newest: int  # the highest number that a version, deleted since, has had


def _as_json(state: _State) -> dict[str, Any]:
    content: dict[str, Any] = dict(state.aliases)
    if state.history:
        content[_HISTORY] = [dict(entry) for entry in state.history]
    if state.newest:
        content[_NEWEST] = state.newest
    return content


def _appoint(state: _State, version: str) -> None:
    """Make a version production, and remember what was."""
    before = state.aliases.get(PRODUCTION)
    if before == version:
        return
    if before is not None:
        state.history.append({"version": before, "until": datetime.now(UTC).isoformat(timespec="seconds")})
    state.aliases[PRODUCTION] = version
    if state.aliases.get(CHALLENGER) == version:
        del state.aliases[CHALLENGER]


def _is_symbol(name: str) -> bool:
    try:
        return parse_symbol(name) == name
    except DataError:
        return False


def _require_alias(alias: str) -> None:
    if alias not in ALIASES:
        raise DataError(f"{alias!r} is not an alias: expected {' or '.join(ALIASES)}")


def _nested(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


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
