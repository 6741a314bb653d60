"""Where a library's use of mamba_ssm gives another result than the library without it, and is put right.

transformers' FalconMamba normalises the step before its projection, but in training mode it hands the norm to
`mamba_inner_fn`, which normalises after it: with mamba_ssm, training and evaluation are two functions.
The mixer takes a None from that function for "no such kernel" and goes on with the others, convolution and scan, which
are then used in both modes; so that is what it gets.
"""

import importlib.abc
import importlib.machinery
from collections.abc import Sequence
from types import ModuleType

ADAPTED = {"transformers.models.falcon_mamba.modeling_falcon_mamba": "mamba_inner_fn"}


def adapted_spec(fullname: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """The spec of one of the modules in ADAPTED; None where it is not there."""
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
        spec.loader = _Loader(spec.loader)
    return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as `real` does, then withdraws the function."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self.real = real

    def __getattr__(self, name: str) -> object:  # get_source and the like, which inspect asks for
        return getattr(self.real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        name = ADAPTED[module.__name__]
        if hasattr(module, name):
            setattr(module, name, _no_such_kernel)


def _no_such_kernel(*arguments: object, **named: object) -> None:
    """What transformers takes for: none."""
