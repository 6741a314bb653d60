"""Files and folders that appear whole or not at all, and folders that prove they are what was written.

Everything is written under a hidden temporary name beside its target, flushed to the disk, and renamed. A process
killed at any moment leaves the old content, or none, and at most a temporary that `remove_leftovers` clears away. A
folder carries `checksums.json`, the SHA-256 of each of its files, so that a changed byte is found when it is read.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mambakit.errors import ArtefactError

if sys.platform != "win32":
    import fcntl

CHECKSUMS = "checksums.json"
# What desktops drop into any folder that a user looks at; no sign that the artefact was changed.
_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.part")
_DAY = 24 * 60 * 60
_PAUSE = 0.02  # seconds between two looks at a lock that is taken


def write_file(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there; folders above it are made.

    Raises:
        ArtefactError: it cannot be written (read-only, disk full, ...); what was there before is still there.
    """
    fill_file(path, lambda temporary: _write_through(temporary, content))


def fill_file(path: str | Path, fill: Callable[[Path], None]) -> None:
    """`write_file` for content too large to hold: `fill(temporary)` writes it into an empty file."""
    path = Path(path)
    temporary = _temporary_beside(path)
    with _one_line_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            with _held(temporary):
                fill(temporary)
                _flush_file(temporary)
                temporary.replace(path)
        except BaseException:
            _delete(temporary)
            raise
        _flush_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`write_file` for a value made of dicts, lists, strings and finite numbers; raises ValueError for NaN."""
    write_file(path, _encoded(value))


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; raises ArtefactError where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {_reason(error)}") from error
    except ValueError as error:
        raise ArtefactError(f"cannot read {path}: it is not JSON ({error})") from error


def write_folder(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` with what `fill(folder)` puts into a hidden folder beside it, and with its checksums.

    Raises:
        FileExistsError: `path` is there already, also when another writer put it there in the meantime.
        ArtefactError: it cannot be written (read-only, disk full, ...). Neither leaves anything behind.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "already there; remove it or choose another name", str(path))
    temporary = _temporary_beside(path)
    try:
        with _one_line_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        with _held(temporary):
            with _one_line_errors("write", path):
                fill(temporary)
                _seal(temporary)
            _rename_onto_nothing(temporary, path)
    finally:
        _delete(temporary)
    with _one_line_errors("write", path):
        _flush_folder(path.parent)


def verify_folder(path: str | Path) -> None:
    """Check a folder made by `write_folder` against its checksums.

    Raises:
        ArtefactError: the folder, or a file in it, is missing, changed, or not in the list; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtefactError(f"{path} is not there: expected a folder with {CHECKSUMS}")
    listed = read_json(path / CHECKSUMS)
    if not isinstance(listed, dict):
        raise ArtefactError(f"{path / CHECKSUMS} is damaged: expected a file name and its SHA-256 on each line")
    found = _content(path)
    for name, checksum in listed.items():
        if name not in found:
            raise ArtefactError(f"{path} is incomplete: {name} is missing")
        if _sha256(found[name]) != checksum:
            raise ArtefactError(f"{path} is damaged: {name} is not what was written (its SHA-256 differs)")
    for name in found:
        if name not in listed:
            raise ArtefactError(f"{path} holds {name}, which {CHECKSUMS} does not list; remove that file")


def remove_folder(path: str | Path) -> None:
    """Remove a folder so that it is there whole or not at all, however this process ends."""
    path = Path(path)
    hidden = _temporary_beside(path)
    with _one_line_errors("remove", path):
        path.rename(hidden)
    _delete(hidden)


def remove_leftovers(parent: str | Path) -> None:
    """Remove the temporaries in `parent` whose writers died; those of living writers stay."""
    for path in Path(parent).glob(".*.part"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError), _held(path) as held:
            # Where nothing can be locked, only its age tells that a writer is gone.
            if held or time.time() - path.stat().st_mtime > _DAY:
                _delete(path)


@contextmanager
def exclusive(folder: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Hold `folder`, made if need be, so that no other process does; let go when this process dies, however it dies.

    Args:
        wait: seconds to wait for whoever holds it.

    Raises:
        ArtefactError: another process, or another part of this one, holds it.
    """
    folder = Path(folder)
    deadline = time.monotonic() + wait
    while True:
        with _one_line_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            release = _lock_folder(folder)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ArtefactError(
                    f"{folder} is in use by another run; wait until that ends, or choose another folder"
                ) from None
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        release()


def _temporary_beside(path: Path) -> Path:
    # `secrets` and not `random`: two processes with the same seed must not choose the same name.
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.part")


def _lock_folder(folder: Path) -> Callable[[], None]:
    """Lock a folder and return what lets it go; BlockingIOError if it is taken."""
    if sys.platform == "win32":  # where a folder itself cannot be locked
        return _lock_beside(folder)
    try:
        descriptor = _lock(folder)
    except FileNotFoundError:  # its last user removed it just now
        raise BlockingIOError from None
    if descriptor is None:
        return lambda: None
    # A lock on a folder that was removed meanwhile, and perhaps made anew, guards nothing.
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return lambda: os.close(descriptor)
    os.close(descriptor)
    raise BlockingIOError


def _lock_beside(folder: Path) -> Callable[[], None]:
    """The same by a file beside the folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError from None
    return lock.release


def _lock(path: Path) -> int | None:
    """A descriptor that locks `path` until closed; None where the system cannot; BlockingIOError if it is taken.

    A lock and not the writer's process id: ids are used again, and mean nothing to another container or host.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    descriptor = _lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _one_line_errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot {verb} {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _rename_onto_nothing(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "another writer was first", str(path)) from error
        raise ArtefactError(f"cannot write {path}: {_reason(error)}") from error


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _flush_file(path: Path) -> None:
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _seal(folder: Path) -> None:
    """Write the checksums, and bring every file and folder to the disk."""
    checksums = {name: _sha256(path, flush=True) for name, path in sorted(_content(folder).items())}
    _write_through(folder / CHECKSUMS, _encoded(checksums))
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def _content(folder: Path) -> dict[str, Path]:
    """The files under `folder` by name, without its own list of checksums."""
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in _DESKTOP_FILES)
    return {path.relative_to(folder).as_posix(): path for path in files if path != folder / CHECKSUMS}


def _sha256(path: Path, flush: bool = False) -> str:
    try:
        # Some systems flush only what is open for writing.
        with path.open("r+b" if flush else "rb", buffering=0) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if flush:
                os.fsync(stream.fileno())
    except OSError as error:
        if flush:
            raise
        raise ArtefactError(f"cannot read {path}: {_reason(error)}") from error
    return digest


def _flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, so that a rename outlives a power cut."""
    if sys.platform == "win32":  # which offers no such call for folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse this for folders; a full or broken disk says something else.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
