"""Where transformers with mamba_ssm computes another function than transformers without it, and is put right.

In training its mixers hand a whole layer to one fused function, and so lose two things that they do everywhere else:
the positions of padding are no longer set to zero after the convolution, whose bias then reaches the states of the
tokens that follow; and FalconMamba's norm of the step comes after its projection in place of before. The mixers take a
None from the fused function for "no such kernel" and go on with convolution and scan, each by its kernel, in training
as in evaluation. Their own fallbacks return that None, and are put back. Nothing is lost: here the fused functions are
convolution and scan one after the other, too.
"""

import importlib.abc
import importlib.machinery
from collections.abc import Sequence
from types import ModuleType

FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")


def is_adapted(fullname: str) -> bool:
    """Whether a module may hand whole layers to a fused function: the modeling files of transformers."""
    return fullname.startswith("transformers.models.") and ".modeling_" in fullname


def adapted_spec(fullname: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """The spec of such a module; None where it is not there."""
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
        spec.loader = _Loader(spec.loader)
    return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as `real` does, then puts its own fallbacks back for the fused functions."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self.real = real

    def __getattr__(self, name: str) -> object:  # get_source and the like, which inspect asks for
        return getattr(self.real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        for name in FUSED:
            # Releases before the fallbacks have none to put back, and keep the function.
            if (fallback := getattr(getattr(module, name, None), "__wrapped__", None)) is not None:
                setattr(module, name, fallback)
