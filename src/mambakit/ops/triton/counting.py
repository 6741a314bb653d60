"""Whole numbers that grids and blocks are counted in; known without loading Triton."""


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return 1 << (int(max(number, least, 1)) - 1).bit_length()  # int: also of a size that torch.compile leaves open


def ceil_div(number: int, size: int) -> int:
    """How many pieces of `size` hold `number`. (Triton's own, made for kernels too, takes microseconds.)"""
    return -(-number // size)
