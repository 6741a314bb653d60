"""What the machine can do, measured, and the least time that an operation could need on it.

Four rates: bytes copied (read and written) a second, floating-point operations of the best matrix product a second,
those of torch's own `mm`, and exponentials a second of `torch.exp` on a tensor that stays in cache. Each is the fastest
of many runs, before every case: a floor must not rise because the machine was busy.

An operation needs at least the time of its bytes and at least that of its arithmetic: the floor is the larger of the
two. Vector arithmetic runs on the units that matrix products use, where one fused multiply-add is two operations; so a
kernel of n element operations needs at least 2 n / (operations of the matrix product a second).
"""

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

# Operations on each (batch, length, dim, state), a fused multiply-add counting once. The decay is a power of two:
# scale, round, subtract, a polynomial of degree 6, place the exponent.
_DECAY = 1 + 1 + 1 + 6 + 1
_STATE_AND_OUTPUT = 2 + 1  # input * B, + decay * h; + h * C
# The gradient of the state and its decayed carry, the product with the earlier state, the sums for A twice, B, C, u.
_SWEEP = 1 + 1 + 1 + 2 + 1 + 1 + 1
SCAN_OPERATIONS = _DECAY + _STATE_AND_OUTPUT
SCAN_BACKWARD_OPERATIONS = SCAN_OPERATIONS + _SWEEP  # the backward forms the states again

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Rates:
    """What was measured, all in units a second."""

    copy_bytes: float  # read and written
    product_flops: float  # the best float32 matrix product at hand
    torch_flops: float  # float32 torch.mm
    exponentials: float  # torch.exp, in cache

    def best(self, other: "Rates") -> "Rates":
        """The higher of each rate."""
        return Rates(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes / 1e9:.1f} GB/s, matrix product {self.product_flops / 1e9:.0f} GFLOP/s "
            f"(torch.mm {self.torch_flops / 1e9:.0f}), torch.exp in cache {self.exponentials / 1e9:.2f} G/s"
        )


@dataclass(frozen=True)
class Floor:
    """A time in milliseconds and how it was found."""

    ms: float
    how: str


def measure_rates() -> Rates:
    """Measure this machine; takes about two seconds."""
    torch_flops = _product_rate(torch.mm)
    return Rates(_copy_rate(), max(torch_flops, _onednn_rate()), torch_flops, _exponential_rate())


def traffic(rates: Rates, floats: float) -> Floor:
    """The time to move `floats` float32 numbers to or from memory."""
    ms = floats * FLOAT_BYTES / rates.copy_bytes * 1e3
    return Floor(ms, f"{floats * FLOAT_BYTES / 1e6:.1f} MB at the copy rate")


def scan(rates: Rates, batch: int, length: int, dim: int, state: int, *, gated: bool, backward: bool) -> Floor:
    """The floor of a selective scan with one group; `backward` adds all gradients to the forward.

    u, delta and y, z where `gated`, and B and C move once; for the backward u, delta, z, B, C and y's gradient are
    read again, and the gradients of all but y written.
    """
    channels, shared = (3 if gated else 2), 2 * state
    floats = batch * length * ((channels + 1) * dim + shared)
    count = SCAN_OPERATIONS
    if backward:
        floats += batch * length * ((2 * channels + 1) * dim + 2 * shared)
        count += SCAN_BACKWARD_OPERATIONS
    memory = traffic(rates, floats)
    operations = count * batch * length * dim * state
    arithmetic = Floor(
        2 * operations / rates.product_flops * 1e3, f"{count} operations an element and state at the product rate"
    )
    return max(memory, arithmetic, key=lambda floor: floor.ms)


def products(rates: Rates, multiply_adds: float) -> Floor:
    """The floor of matrix products of so many multiply-adds."""
    return Floor(2 * multiply_adds / rates.product_flops * 1e3, f"{2 * multiply_adds / 1e9:.1f} GFLOP of products")


def in_sequence(*floors: Floor) -> Floor:
    """The floor of operations that follow one another."""
    return Floor(sum(floor.ms for floor in floors), " + ".join(floor.how for floor in floors))


def _fastest(run: Callable[[], object], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _copy_rate() -> float:
    source = torch.ones(64 * 2**20)  # 256 MB: beyond every cache
    target = torch.empty_like(source)
    return 2 * source.numel() * FLOAT_BYTES / _fastest(lambda: target.copy_(source))


def _product_rate(product: Callable[[Tensor, Tensor], Tensor], size: int = 1024) -> float:
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / _fastest(lambda: product(a, b))


def _onednn_rate() -> float:
    """oneDNN's product, which on some processors is twice as fast as the library behind torch.mm; 0 if not built in."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0.0
    return _product_rate(lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))


def _exponential_rate() -> float:
    x = torch.randn(2**17)  # half a megabyte: stays in the second-level caches
    out, repeats = torch.empty_like(x), 10

    def run() -> None:
        for _ in range(repeats):
            torch.exp(x, out=out)

    return repeats * x.numel() / _fastest(run)
