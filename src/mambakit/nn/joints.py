"""Whether a mixer is as its class made it: what was put into its joints must not be passed by."""

from torch import nn


def as_built(mixer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `mixer` is of exactly this kind and keeps all of its methods."""
    return type(mixer) is kind and not any(callable(getattr(kind, name, None)) for name in mixer.__dict__)
