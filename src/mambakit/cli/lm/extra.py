"""The libraries of the extra `lm`, asked for before anything is done."""

from importlib.util import find_spec

from mambakit.errors import MambakitError


def require(*packages: str) -> None:
    """Raise MambakitError, saying what to install, unless all are there."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MambakitError(f"this command needs {' and '.join(missing)}: install them with pip install 'mambakit[lm]'")
