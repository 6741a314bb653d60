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
    """max(x, 0) + log1p(e), e = exp(-|x|). log1p(e) is e times a polynomial in e, which keeps what is small exact: it
    interpolates log1p(e) / e at the Chebyshev nodes of [0, 1], to 5e-9."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    series = -0.0031760570
    series = series * e + 0.0195425273
    series = series * e - 0.0563736129
    series = series * e + 0.1054362380
    series = series * e - 0.1526966708
    series = series * e + 0.1966327426
    series = series * e - 0.2495161626
    series = series * e + 0.3332971050
    series = series * e - 0.4999989265
    series = series * e + 1.0
    return series * e + tl.maximum(x, 0.0)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def reciprocal(x):
    """1 / x of what is at least 1, to 4e-7: a division would look for numbers too small and too large."""
    root = tl.rsqrt(x)
    return root * root


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
    """N neighbouring numbers, as they lie, eight bytes at a time where PACKS of them fill these (1: one at a time).

    Each is one load of all lanes from one address: reading the numbers one by one would take longer than using them.
    """
    words = ()
    if PACKS == 1:
        for n in tl.static_range(N):
            words = words + (tl.load(pointer + n),)
    else:
        packed = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(N // PACKS):
            words = words + (tl.load(packed + i),)
    return words


@triton.jit
def numbers(words, first, N: tl.constexpr, PACKS: tl.constexpr, number_type: tl.constexpr):
    """The N numbers of `number_type` in the words from `first` on, as float32 scalars."""
    found = ()
    for i in tl.static_range(N // PACKS):
        word = words[first + i]
        if PACKS == 1:
            found = found + (word.to(tl.float32),)
        else:
            for j in tl.static_range(2):
                half = (word >> (32 * j)).to(tl.int32)
                if PACKS == 2:
                    found = found + (half.to(tl.float32, bitcast=True),)
                elif number_type == tl.bfloat16:  # the upper half of a float32
                    found = found + ((half << 16).to(tl.float32, bitcast=True),)
                    found = found + ((half & -65536).to(tl.float32, bitcast=True),)
                else:
                    for k in tl.static_range(2):
                        narrow = (half >> (16 * k)).to(tl.int16).to(tl.float16, bitcast=True)
                        found = found + (narrow.to(tl.float32),)
    return found


@triton.jit
def columns(pointer, row_stride, first, last, UNROLL: tl.constexpr, STEP: tl.constexpr):
    """Rows first, first + STEP ... of the channels that `pointer` points to, the rows clamped to `last`: UNROLL
    tensors as they lie, loaded before they are needed."""
    found = ()
    for i in tl.static_range(UNROLL):
        t = tl.minimum(first + i, last) if STEP > 0 else tl.maximum(first - i, last)
        found = found + (tl.load(pointer + t.to(tl.int64) * row_stride),)
    return found


@triton.jit
def rows(pointer, row_stride, first, last, N: tl.constexpr, PACKS: tl.constexpr, UNROLL: tl.constexpr,
         STEP: tl.constexpr):  # fmt: skip
    """The same of rows of B or C: the words of UNROLL rows, one after another."""
    found = ()
    for i in tl.static_range(UNROLL):
        t = tl.minimum(first + i, last) if STEP > 0 else tl.maximum(first - i, last)
        found = found + row(pointer + t.to(tl.int64) * row_stride, N, PACKS)
    return found


@triton.jit
def fold(x, y, lane, BIT: tl.constexpr):
    """Lanes with BIT clear get x of theirs and of the lane across that bit, lanes with it set y: half of the sum over
    lanes of two values, in one exchange."""
    upper = (lane & BIT) != 0
    return tl.where(upper, y, x) + tl.gather(tl.where(upper, x, y), lane ^ BIT, 0)
