"""Stand-ins for mamba_ssm and causal_conv1d: after `install()`, importing them works anywhere, on mambakit's kernels.

    import mambakit.compat

    mambakit.compat.install()
    from mamba_ssm import Mamba

Programs that can't be edited run under `python -m mambakit.compat SCRIPT ...`. Functions, layers and models keep the
names, layouts, defaults and return values of the packages they stand in for; an argument that can't be honoured raises
`NotServed`. `mambakit.compat.finder.MODULES` lists the modules and what is in them.
"""

import sys
import warnings

from mambakit.compat.finder import MODULES, VERSIONS, Finder, StandIn
from mambakit.compat.refusal import NotServed
from mambakit.errors import DataError

__all__ = ["NotServed", "install", "is_installed", "uninstall"]


def install(force: bool = False) -> tuple[str, ...]:
    """Make `import mamba_ssm` and `import causal_conv1d` find the stand-ins, from here on in this process.

    A package that is really installed stays, unless `force`. Libraries that look for the packages once, when they are
    imported, must be imported afterwards: transformers does so in each of its modeling files, and a warning names those
    that came first.

    Returns the names of the packages stood in for, of which there may be none. Raises DataError where `force` is to
    replace a package that is already imported.
    """
    uninstall()
    packages = tuple(name for name in VERSIONS if force or not really_installed(name))
    if imported := [name for name in packages if name in sys.modules]:
        raise DataError(f"{', '.join(imported)} is already imported; call install(force=True) before that")
    if packages:
        sys.meta_path.insert(0, Finder(packages))
        _warn_of_early_imports()
    return packages


def uninstall() -> None:
    """Undo `install`: the packages are found, or not, as before. What was imported from stand-ins goes on working."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in MODULES:
        if isinstance(getattr(sys.modules.get(name), "__spec__", None), StandIn):
            del sys.modules[name]


def is_installed() -> bool:
    """Whether stand-ins are in place."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def really_installed(package: str) -> bool:
    """Whether the package itself can be found, leaving stand-ins aside."""
    module = sys.modules.get(package)
    if module is not None and not isinstance(module.__spec__, StandIn):
        return True
    for finder in sys.meta_path:
        if not isinstance(finder, Finder) and (spec := finder.find_spec(package, None)) is not None:
            # A folder of that name without an __init__.py is not the package.
            return spec.origin is not None
    return False


def _warn_of_early_imports() -> None:
    looked = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
    needing = sorted(name for name in looked if _looks_for_kernels(name))
    if needing:
        warnings.warn(
            f"{', '.join(needing)} looked for mamba_ssm and causal_conv1d before mambakit.compat.install(), and will "
            "not find the stand-ins: install them first",
            RuntimeWarning,
            stacklevel=3,
        )


def _looks_for_kernels(name: str) -> bool:
    return any(hasattr(sys.modules[name], kernel) for kernel in ("causal_conv1d_fn", "causal_conv1d_update"))
