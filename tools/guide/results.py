"""What chapters showed when they ran: run two at a time, kept by the content of all that decides the result.

That is the chapter's code, the expressions in its prose, the labels of its figures, style.py, and the library itself.
A change of the prose alone runs nothing.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from tools.guide.chapter import Chapter, ChapterError, expressions

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "guide"
SECONDS = 900  # after which a chapter is stopped


def results(
    chapters: Iterable[Chapter], *, cache: Path = CACHE, workers: int = 2, say: Callable[[str], object] = print
) -> dict[str, dict[str, Any]]:
    """What each chapter showed, by its slug: from the cache, or by running it.

    Args:
        chapters: to run, the first ones first.
        cache: the folder of earlier results; it is made, and those that this one replaces are removed.
        workers: the number of chapters that run at the same time, each on one processor.
        say: receives one line when a chapter has run.

    Raises ChapterError with the errors of all chapters that failed.
    """
    chapters = list(chapters)
    with ThreadPoolExecutor(workers) as pool:
        waiting = {chapter.slug: pool.submit(_result, chapter, cache, say) for chapter in chapters}
    failed = [str(done.exception()) for done in waiting.values() if done.exception()]
    if failed:
        raise ChapterError("\n\n".join(failed))
    return {slug: done.result() for slug, done in waiting.items()}


def job(chapter: Chapter) -> dict[str, Any]:
    """What execute.py is told of a chapter."""
    prose = {language: iter(chapter.prose(language)) for language in ["en", *chapter.translations]}
    cells: list[dict[str, Any]] = []
    for cell in chapter.cells:
        entry: dict[str, Any] = {"kind": cell.kind, "line": cell.line}
        if cell.kind == "code":
            entry["text"] = cell.text
        else:
            asked = [text for texts in prose.values() for text in expressions(next(texts))]
            entry["expressions"] = list(dict.fromkeys(asked))
        cells.append(entry)
    labels = {language: translation.labels for language, translation in chapter.translations.items()}
    return {"path": str(chapter.path.resolve()), "cells": cells, "labels": labels}


def _result(chapter: Chapter, cache: Path, say: Callable[[str], object]) -> dict[str, Any]:
    asked = job(chapter)
    kept = cache / f"{chapter.slug}-{_fingerprint(asked)}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    started = time.perf_counter()
    done = _run(chapter, asked)
    say(f"Ran {chapter.slug} in {time.perf_counter() - started:.0f} s")
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{chapter.slug}-*.json"):
        old.unlink(missing_ok=True)
    aside = kept.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(done, ensure_ascii=False), encoding="utf-8")
    aside.replace(kept)
    return done


def _run(chapter: Chapter, asked: dict[str, Any]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1",  # docs/guide stays as it is
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        told, result = Path(folder, "job.json"), Path(folder, "result.json")
        told.write_text(json.dumps(asked), encoding="utf-8")
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "tools.guide.execute", str(told), str(result)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ChapterError(f"{chapter.path.name}: stopped, it had run for {SECONDS} s") from None
        if not result.exists():
            raise ChapterError(
                f"{chapter.path.name}: its process ended with {ended.returncode}\n{ended.stderr[-2000:]}"
            )
        done = json.loads(result.read_text(encoding="utf-8"))
    if "error" in done:
        error = done["error"]
        raise ChapterError(f"{chapter.path.name}, cell {error['cell']} (line {error['line']}):\n{error['text']}")
    return done


def _fingerprint(asked: dict[str, Any]) -> str:
    """Of all that decides what a chapter shows, but for the place where it lies and the lines it stands on."""
    cells = [{name: value for name, value in cell.items() if name != "line"} for cell in asked["cells"]]
    told = json.dumps([cells, asked["labels"]], sort_keys=True)
    beside = [path for path in sorted(Path(asked["path"]).parent.iterdir()) if path.suffix in (".py", ".js")]
    read = [path.read_bytes() for path in beside if path.name == "style.py" or path.name in told]
    return hashlib.sha256(b"\0".join([told.encode(), *read, _library().encode()])).hexdigest()[:20]


@lru_cache(maxsize=1)
def _library() -> str:
    """The content of the library and of what runs chapters."""
    import torch

    import mambakit

    files = [*Path(mambakit.__file__).parent.rglob("*.py"), Path(__file__).with_name("execute.py")]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()
