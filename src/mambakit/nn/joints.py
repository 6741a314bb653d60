"""Whether modules are as they were made: what was put into their joints must not be passed by.

Steps that are taken in fewer calls than there are modules read the modules' weights and call none of them.
"""

from torch import nn


def as_built(mixer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `mixer` is of exactly this kind and keeps all of its methods."""
    return type(mixer) is kind and not any(callable(getattr(kind, name, None)) for name in mixer.__dict__)


def has_hooks(*modules: nn.Module | None) -> bool:
    """Whether calling any of the modules would call something else as well."""
    return any(module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules)
