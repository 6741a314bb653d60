"""Entering what runs measured into a claims file: a `[[measured]]` table for each that they bear on."""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambakit.errors import DataError
from mambakit.lab.claims import Claim, Effect, Measured, claims_from, compare, entry_settings, load_claims
from mambakit.lab.record import Line
from mambakit.training.artefacts import write_file

_FIRST = "[[measured]]"
_DIGITS = 4


def enter(path: str | Path, records: Sequence[Sequence[Line]], command: str, date: datetime.date) -> list[Measured]:
    """Enter what finished runs say of the claims and effects in the file `path`, in place of what stood there for them.

    Runs at a claim's settings are entered as such. Where all differ in how they were trained, they are entered with the
    difference, unless runs at the claim's settings stand there already.

    Args:
        records: lines of the runs.
        command: that made the runs.

    Returns the new entries. Raises DataError for a file that can't be used.
    """
    path = Path(path)
    claims = load_claims(path)
    before = {(entry.of, _key(entry.settings)): entry for entry in claims.measured}
    entered: dict[tuple[str, str], Measured] = {}
    everything: list[Claim | Effect] = [*claims.claims, *claims.effects]
    for one in everything:
        found = compare(one, records)
        if found is None:
            continue
        settings = entry_settings(one)
        key = one.id, _key(settings)
        if found.differing and key in before and not before[key].differing:
            continue
        entered[key] = Measured(
            of=one.id,
            settings=settings,
            seeds=found.seeds,
            best=[round(value, _DIGITS) for value in found.best],
            last=[round(value, _DIGITS) for value in found.last],
            differing=found.differing,
            command=command,
            date=date,
            device=found.device,
        )
    text = path.read_text("utf-8")
    first = re.search(rf"^{re.escape(_FIRST)}", text, re.MULTILINE)
    head = text[: first.start()] if first else text + "\n"
    new = head + "\n".join(_table(entry) for entry in (before | entered).values())
    claims_from(new, str(path))  # what can't be read again is not written
    write_file(path, new.encode())
    return list(entered.values())


def _table(entry: Measured) -> str:
    lines = [_FIRST]
    for name, value in entry.model_dump(exclude_defaults=True).items():
        lines.append(f"{name} = {value if isinstance(value, datetime.date) else _toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + "}"
    if value is None:
        raise DataError("a setting without a value can't be entered: TOML has none")
    return json.dumps(value)  # of strings, numbers, booleans and lists of them TOML's form too


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
