"""What the kernels of the selective scan do at each step: the step's size, its exponentials, a row of B or C.

Decays are taken as powers of two, exp(dt A) = 2^(dt A log2(e)), with log2(e) multiplied into A once: the
multiplication by dt then is all that an exponential costs beside its instruction.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|), where log1p(e) = 2 artanh(e / (2 + e)) keeps what is small exact."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)  # at most 1/3
    q = s * s
    series = 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """dt of the delta that came in."""
    x = raw.to(tl.float32) + bias
    return softplus(x) if SOFTPLUS else x


@triton.jit
def decay_rates(A, channel, N: tl.constexpr):
    """A log2(e) of the channels, one tensor a state."""
    rates = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(A + channel * N + n) * LOG2_E,)
    return rates


@triton.jit
def zeros(N: tl.constexpr, BLOCK: tl.constexpr):
    tensors = ()
    for _ in tl.static_range(N):
        tensors = tensors + (tl.zeros([BLOCK], tl.float32),)
    return tensors


@triton.jit
def row(pointer, N: tl.constexpr, PACKS: tl.constexpr):
    """N neighbouring numbers as float32 scalars, read eight bytes at a time where PACKS numbers fill them (1: don't).

    Each is one load of all lanes from one address: reading them one by one would take longer than the arithmetic.
    """
    numbers = ()
    if PACKS == 1:
        for n in tl.static_range(N):
            numbers = numbers + (tl.load(pointer + n).to(tl.float32),)
    else:
        words = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(N // PACKS):
            word = tl.load(words + i)
            for j in tl.static_range(2):
                half = (word >> (32 * j)).to(tl.int32)
                if PACKS == 2:
                    numbers = numbers + (half.to(tl.float32, bitcast=True),)
                elif pointer.dtype.element_ty == tl.bfloat16:  # the upper half of a float32
                    numbers = numbers + ((half << 16).to(tl.float32, bitcast=True),)
                    numbers = numbers + ((half & -65536).to(tl.float32, bitcast=True),)
                else:
                    for k in tl.static_range(2):
                        narrow = (half >> (16 * k)).to(tl.int16).to(tl.float16, bitcast=True)
                        numbers = numbers + (narrow.to(tl.float32),)
    return numbers
