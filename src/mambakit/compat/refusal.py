"""What a stand-in says of an argument that it can't honour."""

from mambakit.errors import MambakitError


class NotServed(MambakitError, NotImplementedError):
    """An argument of mamba_ssm or causal_conv1d that has no equal here; the message names it and the way out."""


def check_activation(activation: str | None) -> None:
    """Refuse an activation other than None, "silu" and its other name "swish"."""
    if activation not in (None, "silu", "swish"):
        raise NotServed(f"activation must be None, 'silu' or 'swish', got {activation!r}")
