"""Mamba-2 between its projections, for sequences of a few tokens: a warp holds a whole sequence in its registers.

The scan is its dual form, in which no state appears,

    y_t = sum over s <= t of (C_t . B_s) exp(a (dt_{s+1} + ... + dt_t)) dt_s x_s + D x_t

with the steps of time written out by the compiler, so that the convolution's shifts are a choice among registers. The
backward forms all of it again from what the in-projection gave. A program goes from sequence to sequence of its model
and keeps its share of the parameters' gradients; the shares are added afterwards, in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(at, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """What lies at a vector of places of each token."""
    rows = ()
    for t in tl.static_range(LENGTH):
        rows = rows + (tl.load(at + t * STRIDE),)
    return rows


@triton.jit
def _taps(weight, TAPS: tl.constexpr):
    """The taps of channels, that of the token itself first."""
    taps = ()
    for back in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + (TAPS - 1 - back)),)
    return taps


@triton.jit
def _total(given, taps, bias, t: tl.constexpr, TAPS: tl.constexpr):
    """The convolution at token t, before its silu."""
    total = bias
    for back in tl.static_range(TAPS):
        if back <= t:
            total += taps[back] * given[t - back]
    return total


@triton.jit
def _activated(given, total, PATH: tl.constexpr):
    on = total / (1.0 + tl.exp(-total))
    if PATH == 1:
        on += given
    if PATH == 2:
        on *= given
    return on


@triton.jit
def _convolved(given, taps, bias, LENGTH: tl.constexpr, TAPS: tl.constexpr, PATH: tl.constexpr):
    """What the scan reads of each token."""
    found = ()
    for t in tl.static_range(LENGTH):
        found = found + (_activated(given[t], _total(given, taps, bias, t, TAPS), PATH),)
    return found


@triton.jit
def _steps(at, bias, rate, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """Of each token: dt before its softplus, dt, and the sum of the decays' logarithms up to it."""
    raw, steps, sums = (), (), ()
    total = 0.0
    for t in tl.static_range(LENGTH):
        shifted = tl.load(at + t * STRIDE) + bias
        step = tl.where(shifted > 20.0, shifted, tl.log(1.0 + tl.exp(tl.minimum(shifted, 20.0))))
        total += step * rate
        raw, steps, sums = raw + (shifted,), steps + (step,), sums + (total,)
    return raw, steps, sums


@triton.jit
def _zeros(COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([COLUMNS], dtype=tl.float32),)
    return found


@triton.jit
def _put(values, place: tl.constexpr, value, COUNT: tl.constexpr):
    """The tuple with one of its values replaced."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + ((value if i == place else values[i]),)
    return found


@triton.jit(do_not_specialize=["batch"])
def mix_forward(
    projected,  # (models, batch, LENGTH, WIDTH): z, x, B, C, dt, filling
    conv_weight,  # (models, INNER + 2 STATE, TAPS)
    conv_bias,  # (models, INNER + 2 STATE)
    dt_bias,  # (models,), as A_log and D
    A_log,
    D,
    norm_weight,  # (models, INNER)
    out,  # (models, batch, LENGTH, INNER)
    batch,
    eps,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
    STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PATH: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    inner, key = tl.arange(0, INNER), tl.arange(0, STATE)
    conv_weight += model * CONVOLVED * TAPS
    conv_bias += model * CONVOLVED
    taps_x, bias_x = _taps(conv_weight + inner * TAPS, TAPS), tl.load(conv_bias + inner)
    taps_B, bias_B = _taps(conv_weight + (INNER + key) * TAPS, TAPS), tl.load(conv_bias + INNER + key)
    taps_C, bias_C = _taps(conv_weight + (INNER + STATE + key) * TAPS, TAPS), tl.load(conv_bias + INNER + STATE + key)
    rate = -tl.exp(tl.load(A_log + model))
    bias, skip = tl.load(dt_bias + model), tl.load(D + model)
    scale = tl.load(norm_weight + model * INNER + inner)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z = projected + row * WIDTH
        u = z + INNER
        _, steps, sums = _steps(u + CONVOLVED, bias, rate, LENGTH, WIDTH)
        x = _convolved(_rows(u + inner, LENGTH, WIDTH), taps_x, bias_x, LENGTH, TAPS, PATH)
        B = _convolved(_rows(u + INNER + key, LENGTH, WIDTH), taps_B, bias_B, LENGTH, TAPS, PATH)
        given_C = _rows(u + INNER + STATE + key, LENGTH, WIDTH)
        for t in tl.static_range(LENGTH):
            C = _activated(given_C[t], _total(given_C, taps_C, bias_C, t, TAPS), PATH)
            y = skip * x[t]
            for s in tl.static_range(t + 1):
                y += tl.sum(C * B[s]) * tl.exp(sums[t] - sums[s]) * steps[s] * x[s]
            gate = tl.load(z + t * WIDTH + inner)
            y *= gate / (1.0 + tl.exp(-gate))
            inverse = 1.0 / tl.sqrt(tl.sum(y * y) / INNER + eps)
            tl.store(out + (row + t) * INNER + inner, y * inverse * scale)


@triton.jit
def _convolve_backward(
    grads,
    at,
    d_at,
    taps,
    bias,
    d_taps,
    d_bias,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    PATH: tl.constexpr,
):
    """Write the gradient of what was convolved, and add to those of the taps and the bias."""
    given = _rows(at, LENGTH, STRIDE)
    totals = ()
    for t in tl.static_range(LENGTH):
        total = _total(given, taps, bias, t, TAPS)
        sigmoid = 1.0 / (1.0 + tl.exp(-total))
        grad = grads[t]
        if PATH == 2:
            grad *= given[t]
        totals = totals + (grad * sigmoid * (1.0 + total * (1.0 - sigmoid)),)
        d_bias += totals[t]
    for back in tl.static_range(TAPS):
        share = d_taps[back]
        for t in tl.static_range(LENGTH):
            if back <= t:
                share += totals[t] * given[t - back]
        d_taps = _put(d_taps, back, share, TAPS)
    for t in tl.static_range(LENGTH):
        d_given = tl.zeros([COLUMNS], dtype=tl.float32)
        if PATH == 1:
            d_given += grads[t]
        if PATH == 2:
            total = _total(given, taps, bias, t, TAPS)
            d_given += grads[t] * total / (1.0 + tl.exp(-total))
        for back in tl.static_range(TAPS):
            if t + back < LENGTH:
                d_given += taps[back] * totals[t + back]
        tl.store(d_at + t * STRIDE, d_given)
    return d_taps, d_bias


@triton.jit(do_not_specialize=["batch"])
def mix_backward(
    projected,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    norm_weight,
    d_out,
    d_projected,
    shares,  # (models, programs, SHARE): of dt_bias, A_log, D, unused; norm_weight; bias; taps, the token's own first
    batch,
    eps,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
    STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PATH: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    SHARE: tl.constexpr = 4 + INNER + CONVOLVED * (1 + TAPS)
    inner, key = tl.arange(0, INNER), tl.arange(0, STATE)
    conv_weight += model * CONVOLVED * TAPS
    conv_bias += model * CONVOLVED
    taps_x, bias_x = _taps(conv_weight + inner * TAPS, TAPS), tl.load(conv_bias + inner)
    taps_B, bias_B = _taps(conv_weight + (INNER + key) * TAPS, TAPS), tl.load(conv_bias + INNER + key)
    taps_C, bias_C = _taps(conv_weight + (INNER + STATE + key) * TAPS, TAPS), tl.load(conv_bias + INNER + STATE + key)
    rate = -tl.exp(tl.load(A_log + model))
    bias, skip = tl.load(dt_bias + model), tl.load(D + model)
    scale = tl.load(norm_weight + model * INNER + inner)

    d_bias, d_A_log, d_skip = 0.0, 0.0, 0.0
    d_scale = tl.zeros([INNER], dtype=tl.float32)
    d_taps_x, d_bias_x = _zeros(TAPS, INNER), tl.zeros([INNER], dtype=tl.float32)
    d_taps_B, d_bias_B = _zeros(TAPS, STATE), tl.zeros([STATE], dtype=tl.float32)
    d_taps_C, d_bias_C = _zeros(TAPS, STATE), tl.zeros([STATE], dtype=tl.float32)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z, d_z = projected + row * WIDTH, d_projected + row * WIDTH
        u, d_u = z + INNER, d_z + INNER
        raw, steps, sums = _steps(u + CONVOLVED, bias, rate, LENGTH, WIDTH)
        x = _convolved(_rows(u + inner, LENGTH, WIDTH), taps_x, bias_x, LENGTH, TAPS, PATH)
        B = _convolved(_rows(u + INNER + key, LENGTH, WIDTH), taps_B, bias_B, LENGTH, TAPS, PATH)
        given_C = _rows(u + INNER + STATE + key, LENGTH, WIDTH)
        d_x, d_B, d_C = _zeros(LENGTH, INNER), _zeros(LENGTH, STATE), ()
        d_steps, d_sums = (), ()
        for _ in tl.static_range(LENGTH):
            d_steps, d_sums = d_steps + (0.0,), d_sums + (0.0,)
        for t in tl.static_range(LENGTH):
            C = _activated(given_C[t], _total(given_C, taps_C, bias_C, t, TAPS), PATH)
            products = ()
            y = skip * x[t]
            for s in tl.static_range(t + 1):
                products = products + (tl.sum(C * B[s]),)
                y += products[s] * tl.exp(sums[t] - sums[s]) * steps[s] * x[s]

            # the gate and the norm
            gate = tl.load(z + t * WIDTH + inner)
            grad = tl.load(d_out + (row + t) * INNER + inner)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            gated = y * gate * sigmoid
            inverse = 1.0 / tl.sqrt(tl.sum(gated * gated) / INNER + eps)
            normed = gated * inverse
            d_scale += grad * normed
            grad *= scale
            grad = inverse * (grad - normed * (tl.sum(grad * normed) / INNER))
            tl.store(d_z + t * WIDTH + inner, grad * y * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
            d_y = grad * gate * sigmoid

            # the scan
            d_skip += tl.sum(d_y * x[t])
            d_x = _put(d_x, t, d_x[t] + skip * d_y, LENGTH)
            d_key = tl.zeros([STATE], dtype=tl.float32)
            for s in tl.static_range(t + 1):
                decay = tl.exp(sums[t] - sums[s])
                d_mixing = tl.sum(d_y * x[s])
                d_x = _put(d_x, s, d_x[s] + products[s] * decay * steps[s] * d_y, LENGTH)
                d_product = d_mixing * decay * steps[s]
                d_key += d_product * B[s]
                d_B = _put(d_B, s, d_B[s] + d_product * C, LENGTH)
                through = d_mixing * products[s] * decay
                d_steps = _put(d_steps, s, d_steps[s] + through, LENGTH)
                d_sums = _put(d_sums, t, d_sums[t] + through * steps[s], LENGTH)
                d_sums = _put(d_sums, s, d_sums[s] - through * steps[s], LENGTH)
            d_C = d_C + (d_key,)

        # the steps
        d_log = 0.0  # of every sum that a step is in
        for t in tl.static_range(LENGTH - 1, -1, -1):
            d_log += d_sums[t]
            d_A_log += d_log * steps[t] * rate
            d_raw = (d_steps[t] + d_log * rate) / (1.0 + tl.exp(-raw[t]))
            d_bias += d_raw
            filling = tl.arange(0, 4)
            tl.store(d_u + t * WIDTH + CONVOLVED + filling, tl.where(filling == 0, d_raw, 0.0))

        # the convolution
        d_taps_x, d_bias_x = _convolve_backward(
            d_x, u + inner, d_u + inner, taps_x, bias_x, d_taps_x, d_bias_x, INNER, LENGTH, WIDTH, TAPS, PATH
        )
        at, d_at = u + INNER + key, d_u + INNER + key
        d_taps_B, d_bias_B = _convolve_backward(
            d_B, at, d_at, taps_B, bias_B, d_taps_B, d_bias_B, STATE, LENGTH, WIDTH, TAPS, PATH
        )
        d_taps_C, d_bias_C = _convolve_backward(
            d_C, at + STATE, d_at + STATE, taps_C, bias_C, d_taps_C, d_bias_C, STATE, LENGTH, WIDTH, TAPS, PATH
        )

    shares += (model * tl.num_programs(0) + tl.program_id(0)) * SHARE
    tl.store(shares, d_bias)
    tl.store(shares + 1, d_A_log)
    tl.store(shares + 2, d_skip)
    tl.store(shares + 3, 0.0)
    tl.store(shares + 4 + inner, d_scale)
    shares += 4 + INNER
    tl.store(shares + inner, d_bias_x)
    tl.store(shares + INNER + key, d_bias_B)
    tl.store(shares + INNER + STATE + key, d_bias_C)
    for back in tl.static_range(TAPS):
        shares += CONVOLVED
        tl.store(shares + inner, d_taps_x[back])
        tl.store(shares + INNER + key, d_taps_B[back])
        tl.store(shares + INNER + STATE + key, d_taps_C[back])


@triton.jit(do_not_specialize=["rows"])
def normalise(x, y, rows, eps, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) of every row (rows, COLUMNS)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    at = row.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + at, mask=row < rows, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)
    tl.store(y + at, value * inverse[:, None], mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def normalise_backward(x, d_y, d_x, rows, eps, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """The gradient of x."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    at = row.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + at, mask=row < rows, other=0.0)
    grad = tl.load(d_y + at, mask=row < rows, other=0.0)
    inverse = (1.0 / tl.sqrt(tl.sum(value * value, axis=1) / COLUMNS + eps))[:, None]
    value *= inverse
    grad = inverse * (grad - value * (tl.sum(grad * value, axis=1) / COLUMNS)[:, None])
    tl.store(d_x + at, grad, mask=row < rows)
