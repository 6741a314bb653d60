"""All cases, in the order that they run."""

from benchmarks.case import Case
from benchmarks.cases import convolution, mixer, scan, ssd, step, training_step


def all_cases() -> list[Case]:
    """The cases at the sizes that the goals name."""
    return [*scan.cases(), *convolution.cases(), *mixer.cases(), *ssd.cases(), *step.cases(), *training_step.cases()]
