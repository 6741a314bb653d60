"""What the kernels of short sequences do with each token: the convolution and its way back, steps and decays.

The tokens of a sequence are tuples, written out by the compiler.

FAST takes exponentials and quotients that the GPU has as one instruction, a unit or two in the last place from exact
ones, with denormal numbers as zero; Triton's interpreter has none of them.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from mambakit.ops.triton.ssd_steps import LOG2_E


@triton.jit
def rows_of(at, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """What lies at a vector of places of each token."""
    rows = ()
    for t in tl.static_range(LENGTH):
        rows = rows + (tl.load(at + t * STRIDE),)
    return rows


@triton.jit
def taps_of(weight, TAPS: tl.constexpr):
    """The taps of channels, that of the token itself first."""
    taps = ()
    for back in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + (TAPS - 1 - back)),)
    return taps


@triton.jit
def exp(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.exp2(x * LOG2_E)
    else:
        return tl.exp(x)


@triton.jit
def sigmoid_of(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(x * -LOG2_E))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def convolved(given, taps, bias, LENGTH: tl.constexpr, TAPS: tl.constexpr, PATH: tl.constexpr, FAST: tl.constexpr):
    """What the scan reads of each token, and for the backward the silu in it and the silu's slope."""
    found, silus, slopes = (), (), ()
    for t in tl.static_range(LENGTH):
        total = bias
        for back in tl.static_range(TAPS):
            if back <= t:
                total += taps[back] * given[t - back]
        sigmoid = sigmoid_of(total, FAST)
        silu = total * sigmoid
        on = silu
        if PATH == 1:
            on += given[t]
        if PATH == 2:
            on *= given[t]
        found, silus, slopes = found + (on,), silus + (silu,), slopes + (sigmoid + silu * (1.0 - sigmoid),)
    return found, silus, slopes


@triton.jit
def convolve_backward(
    grads, given, silus, slopes, d_at, taps, d_taps, d_bias,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of what was convolved, and add to those of the taps and the bias."""
    totals = ()
    for t in tl.static_range(LENGTH):
        grad = grads[t] * slopes[t]
        if PATH == 2:
            grad *= given[t]
        totals = totals + (grad,)
        d_bias += grad
    shares = ()
    for back in tl.static_range(TAPS):
        share = d_taps[back]
        for t in tl.static_range(LENGTH):
            if back <= t:
                share += totals[t] * given[t - back]
        shares = shares + (share,)
    for t in tl.static_range(LENGTH):
        d_given = taps[0] * totals[t]
        for back in tl.static_range(1, TAPS):
            if t + back < LENGTH:
                d_given += taps[back] * totals[t + back]
        if PATH == 1:
            d_given += grads[t]
        if PATH == 2:
            d_given += grads[t] * silus[t]
        tl.store(d_at + t * STRIDE, d_given)
    return shares, d_bias


@triton.jit
def steps_of(at, bias, rate, LENGTH: tl.constexpr, STRIDE: tl.constexpr, FAST: tl.constexpr):
    """Of each token: dt before its softplus, dt, and what the state keeps from the token before."""
    raw, steps, kept = (), (), ()
    for t in tl.static_range(LENGTH):
        shifted = tl.load(at + t * STRIDE) + bias
        step = tl.where(shifted > 20.0, shifted, tl.log(1.0 + exp(tl.minimum(shifted, 20.0), FAST)))
        raw, steps, kept = raw + (shifted,), steps + (step,), kept + (exp(step * rate, FAST),)
    return raw, steps, kept


@triton.jit
def decays_of(kept, t: tl.constexpr):
    """What token t keeps of tokens 0, 1, ..., t."""
    decays = (1.0,)
    decay = 1.0
    for back in tl.static_range(t):
        decay *= kept[t - back]
        decays = (decay,) + decays
    return decays


@triton.jit
def zeros(COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([COLUMNS], dtype=tl.float32),)
    return found


@triton.jit
def put(values, place: tl.constexpr, value, COUNT: tl.constexpr):
    """The tuple with one of its values replaced."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + ((value if i == place else values[i]),)
    return found
