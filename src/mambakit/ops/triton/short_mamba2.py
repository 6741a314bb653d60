"""Mamba-2 between its projections, for sequences of a few tokens: a warp holds a whole sequence in its registers.

The scan is its dual form, in which no state appears,

    y_t = sum over s <= t of (C_t . B_s) exp(a (dt_{s+1} + ... + dt_t)) dt_s x_s + D x_t

with the steps of time written out by the compiler, so that the convolution's shifts are a choice among registers.

The forward keeps the products C_t . B_s, a number for each pair of tokens. With them the backward falls in two that
share no channels: `mix_backward_values` needs no keys, and leaves the products' gradients to `mix_backward_keys`, for
which a few keys are enough at once. Both form what they need again from what the in-projection gave. A program goes
from sequence to sequence of its model and keeps its share of the parameters' gradients; the shares are added
afterwards, in a fixed order.

FAST takes exponentials and quotients that the GPU has as one instruction, a unit or two in the last place from exact
ones, with denormal numbers as zero; Triton's interpreter has none of them.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from mambakit.ops.triton.ssd_steps import LOG2_E

_NUMBERS = ["batch", "stride_weight", "stride_bias", "stride_dt", "stride_A", "stride_D", "stride_norm"]
# Parts of a larger tensor, which begin anywhere: no kernel of its own for each way that they are aligned.
_ANYWHERE = ["conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"]


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
def _exp(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.exp2(x * LOG2_E)
    else:
        return tl.exp(x)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.exp2(x * -LOG2_E))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _convolved(given, taps, bias, LENGTH: tl.constexpr, TAPS: tl.constexpr, PATH: tl.constexpr, FAST: tl.constexpr):
    """What the scan reads of each token, and for the backward the silu in it and the silu's slope."""
    found, silus, slopes = (), (), ()
    for t in tl.static_range(LENGTH):
        total = bias
        for back in tl.static_range(TAPS):
            if back <= t:
                total += taps[back] * given[t - back]
        sigmoid = _sigmoid(total, FAST)
        silu = total * sigmoid
        on = silu
        if PATH == 1:
            on += given[t]
        if PATH == 2:
            on *= given[t]
        found, silus, slopes = found + (on,), silus + (silu,), slopes + (sigmoid + silu * (1.0 - sigmoid),)
    return found, silus, slopes


@triton.jit
def _convolve_backward(
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
def _steps(at, bias, rate, LENGTH: tl.constexpr, STRIDE: tl.constexpr, FAST: tl.constexpr):
    """Of each token: dt before its softplus, dt, and what the state keeps from the token before."""
    raw, steps, kept = (), (), ()
    for t in tl.static_range(LENGTH):
        shifted = tl.load(at + t * STRIDE) + bias
        step = tl.where(shifted > 20.0, shifted, tl.log(1.0 + _exp(tl.minimum(shifted, 20.0), FAST)))
        raw, steps, kept = raw + (shifted,), steps + (step,), kept + (_exp(step * rate, FAST),)
    return raw, steps, kept


@triton.jit
def _decays(kept, t: tl.constexpr):
    """What token t keeps of tokens 0, 1, ..., t."""
    decays = (1.0,)
    decay = 1.0
    for back in tl.static_range(t):
        decay *= kept[t - back]
        decays = (decay,) + decays
    return decays


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


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def mix_forward(
    projected,  # (models, batch, LENGTH, WIDTH): z, x, B, C, dt, filling
    conv_weight,  # (models, INNER + 2 STATE, 1, TAPS)
    conv_bias,  # (models, INNER + 2 STATE)
    dt_bias,  # (models,), as A_log and D
    A_log, D,
    norm_weight,  # (models, INNER)
    out,  # (models, batch, LENGTH, INNER)
    products,  # (models, batch, LENGTH, LENGTH): C_t . B_s for s <= t
    batch,
    stride_weight,  # between models, of what is models' own
    stride_bias, stride_dt, stride_A, stride_D, stride_norm, eps,
    LENGTH: tl.constexpr, INNER: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    PATH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    inner, key = tl.arange(0, INNER), tl.arange(0, STATE)
    conv_weight += model * stride_weight
    conv_bias += model * stride_bias
    taps_x, bias_x = _taps(conv_weight + inner * TAPS, TAPS), tl.load(conv_bias + inner)
    taps_B, bias_B = _taps(conv_weight + (INNER + key) * TAPS, TAPS), tl.load(conv_bias + INNER + key)
    taps_C, bias_C = _taps(conv_weight + (INNER + STATE + key) * TAPS, TAPS), tl.load(conv_bias + INNER + STATE + key)
    rate = -tl.exp(tl.load(A_log + model * stride_A))
    bias, skip = tl.load(dt_bias + model * stride_dt), tl.load(D + model * stride_D)
    scale = tl.load(norm_weight + model * stride_norm + inner)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z = projected + row * WIDTH
        u = z + INNER
        given_C = _rows(u + INNER + STATE + key, LENGTH, WIDTH)
        B, _, _ = _convolved(_rows(u + INNER + key, LENGTH, WIDTH), taps_B, bias_B, LENGTH, TAPS, PATH, FAST)
        C, _, _ = _convolved(given_C, taps_C, bias_C, LENGTH, TAPS, PATH, FAST)
        mixing = ()  # a tuple of each token's
        for t in tl.static_range(LENGTH):
            of_token = ()
            for s in tl.static_range(t + 1):
                of_token = of_token + (tl.sum(C[t] * B[s]),)
            mixing = mixing + (of_token,)
        _, steps, kept = _steps(u + CONVOLVED, bias, rate, LENGTH, WIDTH, FAST)
        gates = _rows(z + inner, LENGTH, WIDTH)
        x, _, _ = _convolved(_rows(u + inner, LENGTH, WIDTH), taps_x, bias_x, LENGTH, TAPS, PATH, FAST)
        pairs = products + row * LENGTH
        for t in tl.static_range(LENGTH):
            y = skip * x[t]
            decays = _decays(kept, t)
            for s in tl.static_range(t + 1):
                tl.store(pairs + (t * LENGTH + s), mixing[t][s])
                y += mixing[t][s] * decays[s] * steps[s] * x[s]
            y *= gates[t] * _sigmoid(gates[t], FAST)
            inverse = tl.rsqrt(tl.sum(y * y) / INNER + eps)
            tl.store(out + (row + t) * INNER + inner, y * inverse * scale)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def mix_backward_values(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, products, d_out,
    d_projected,  # of z, x and dt
    d_products,
    shares,  # (models, programs, SHARE): of dt_bias, A_log, D, unused; norm_weight; conv_bias; conv_weight
    batch,
    stride_weight,  # between models, of what is models' own
    stride_bias, stride_dt, stride_A, stride_D, stride_norm, eps,
    LENGTH: tl.constexpr, INNER: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    PATH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    SHARE: tl.constexpr = 4 + INNER + CONVOLVED * (1 + TAPS)
    FILLED: tl.constexpr = WIDTH - INNER - CONVOLVED
    inner, filling = tl.arange(0, INNER), tl.arange(0, 8)
    taps = _taps(conv_weight + model * stride_weight + inner * TAPS, TAPS)
    bias_x = tl.load(conv_bias + model * stride_bias + inner)
    rate = -tl.exp(tl.load(A_log + model * stride_A))
    bias, skip = tl.load(dt_bias + model * stride_dt), tl.load(D + model * stride_D)
    scale = tl.load(norm_weight + model * stride_norm + inner)

    d_bias, d_A_log, d_skip = 0.0, 0.0, 0.0
    d_scale = tl.zeros([INNER], dtype=tl.float32)
    d_taps, d_bias_x = _zeros(TAPS, INNER), tl.zeros([INNER], dtype=tl.float32)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z, d_z = projected + row * WIDTH, d_projected + row * WIDTH
        u, d_u = z + INNER, d_z + INNER
        pairs, d_pairs = products + row * LENGTH, d_products + row * LENGTH
        given = _rows(u + inner, LENGTH, WIDTH)
        gates = _rows(z + inner, LENGTH, WIDTH)
        grads = _rows(d_out + row * INNER + inner, LENGTH, INNER)
        raw, steps, kept = _steps(u + CONVOLVED, bias, rate, LENGTH, WIDTH, FAST)
        x, silus, slopes = _convolved(given, taps, bias_x, LENGTH, TAPS, PATH, FAST)
        d_x = _zeros(LENGTH, INNER)
        d_steps, d_sums = (), ()  # sums: of the decays' logarithms up to a token
        for _ in tl.static_range(LENGTH):
            d_steps, d_sums = d_steps + (0.0,), d_sums + (0.0,)
        for t in tl.static_range(LENGTH):
            decays = _decays(kept, t)
            unscaled = ()  # by dt
            y = skip * x[t]
            for s in tl.static_range(t + 1):
                unscaled = unscaled + (tl.load(pairs + (t * LENGTH + s)) * decays[s],)
                y += unscaled[s] * steps[s] * x[s]

            # the gate and the norm
            gate = gates[t]
            sigmoid = _sigmoid(gate, FAST)
            gated = y * gate * sigmoid
            grad = grads[t] * scale
            along = tl.sum(grad * gated)  # beside the next sum, which it does not wait for
            inverse = tl.rsqrt(tl.sum(gated * gated) / INNER + eps)
            normed = gated * inverse
            d_scale += grads[t] * normed
            grad = inverse * (grad - normed * (along * inverse / INNER))
            tl.store(d_z + t * WIDTH + inner, grad * y * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
            d_y = grad * gate * sigmoid

            # the scan
            d_x = _put(d_x, t, d_x[t] + skip * d_y, LENGTH)
            for s in tl.static_range(t + 1):
                d_mixing = tl.sum(d_y * x[s])
                if s == t:
                    d_skip += d_mixing
                mixing = unscaled[s] * steps[s]
                d_x = _put(d_x, s, d_x[s] + mixing * d_y, LENGTH)
                tl.store(d_pairs + (t * LENGTH + s), d_mixing * decays[s] * steps[s])
                d_steps = _put(d_steps, s, d_steps[s] + d_mixing * unscaled[s], LENGTH)
                d_sums = _put(d_sums, t, d_sums[t] + d_mixing * mixing, LENGTH)
                d_sums = _put(d_sums, s, d_sums[s] - d_mixing * mixing, LENGTH)

        # the steps
        d_log = 0.0  # of every sum that a step is in
        for t in tl.static_range(LENGTH - 1, -1, -1):
            d_log += d_sums[t]
            d_A_log += d_log * steps[t] * rate
            d_raw = (d_steps[t] + d_log * rate) * _sigmoid(raw[t], FAST)
            d_bias += d_raw
            tl.store(d_u + t * WIDTH + CONVOLVED + filling, tl.where(filling == 0, d_raw, 0.0), mask=filling < FILLED)
        d_taps, d_bias_x = _convolve_backward(
            d_x, given, silus, slopes, d_u + inner, taps, d_taps, d_bias_x, LENGTH, WIDTH, TAPS, PATH
        )

    shares += (model * tl.num_programs(0) + tl.program_id(0)) * SHARE
    tl.store(shares, d_bias)
    tl.store(shares + 1, d_A_log)
    tl.store(shares + 2, d_skip)
    tl.store(shares + 3, 0.0)
    tl.store(shares + 4 + inner, d_scale)
    _store_shares(shares + 4 + INNER, inner, d_bias_x, d_taps, CONVOLVED, TAPS)


@triton.jit(do_not_specialize=_NUMBERS[:3], do_not_specialize_on_alignment=_ANYWHERE[:2])
def mix_backward_keys(
    projected, conv_weight, conv_bias, d_products,
    d_projected,  # of B and C
    shares,
    batch, stride_weight, stride_bias,
    LENGTH: tl.constexpr, INNER: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
    PATH: tl.constexpr, FAST: tl.constexpr,
    KEYS: tl.constexpr,  # of a program
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    CONVOLVED: tl.constexpr = INNER + 2 * STATE
    SHARE: tl.constexpr = 4 + INNER + CONVOLVED * (1 + TAPS)
    of_B = INNER + tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    of_C = of_B + STATE
    conv_weight += model * stride_weight
    conv_bias += model * stride_bias
    taps_B, bias_B = _taps(conv_weight + of_B * TAPS, TAPS), tl.load(conv_bias + of_B)
    taps_C, bias_C = _taps(conv_weight + of_C * TAPS, TAPS), tl.load(conv_bias + of_C)
    d_taps_B, d_bias_B = _zeros(TAPS, KEYS), tl.zeros([KEYS], dtype=tl.float32)
    d_taps_C, d_bias_C = _zeros(TAPS, KEYS), tl.zeros([KEYS], dtype=tl.float32)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        u, d_u = projected + row * WIDTH + INNER, d_projected + row * WIDTH + INNER
        d_pairs = d_products + row * LENGTH
        given_B, given_C = _rows(u + of_B, LENGTH, WIDTH), _rows(u + of_C, LENGTH, WIDTH)
        B, silus_B, slopes_B = _convolved(given_B, taps_B, bias_B, LENGTH, TAPS, PATH, FAST)
        C, silus_C, slopes_C = _convolved(given_C, taps_C, bias_C, LENGTH, TAPS, PATH, FAST)
        d_B, d_C = _zeros(LENGTH, KEYS), ()
        for t in tl.static_range(LENGTH):
            grad = tl.zeros([KEYS], dtype=tl.float32)
            for s in tl.static_range(t + 1):
                d_product = tl.load(d_pairs + (t * LENGTH + s))
                grad += d_product * B[s]
                d_B = _put(d_B, s, d_B[s] + d_product * C[t], LENGTH)
            d_C = d_C + (grad,)
        d_taps_B, d_bias_B = _convolve_backward(
            d_B, given_B, silus_B, slopes_B, d_u + of_B, taps_B, d_taps_B, d_bias_B, LENGTH, WIDTH, TAPS, PATH
        )
        d_taps_C, d_bias_C = _convolve_backward(
            d_C, given_C, silus_C, slopes_C, d_u + of_C, taps_C, d_taps_C, d_bias_C, LENGTH, WIDTH, TAPS, PATH
        )
    shares += (model * tl.num_programs(0) + tl.program_id(0)) * SHARE + 4 + INNER
    _store_shares(shares, of_B, d_bias_B, d_taps_B, CONVOLVED, TAPS)
    _store_shares(shares, of_C, d_bias_C, d_taps_C, CONVOLVED, TAPS)


@triton.jit
def _store_shares(at, channels, d_bias, d_taps, CONVOLVED: tl.constexpr, TAPS: tl.constexpr):
    tl.store(at + channels, d_bias)
    for back in tl.static_range(TAPS):
        tl.store(at + CONVOLVED + channels * TAPS + (TAPS - 1 - back), d_taps[back])


@triton.jit(do_not_specialize=["rows", "stride"], do_not_specialize_on_alignment=["weight"])
def normalise(
    x,  # (models, rows, COLUMNS), as all but weight
    added,  # None for nothing
    weight,  # (models, COLUMNS)
    total,  # x + added; x itself where nothing is added
    y,
    rows,
    stride,  # between models' weights
    eps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """total = x + added and y = weight total / sqrt(mean(total^2) + eps) of every row."""
    model = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, COLUMNS)
    at = (model * rows + row) * COLUMNS + column[None, :]
    scale = tl.load(weight + model * stride + column)
    value = tl.load(x + at, mask=row < rows, other=0.0)
    if added is not None:
        value += tl.load(added + at, mask=row < rows, other=0.0)
        tl.store(total + at, value, mask=row < rows)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)
    tl.store(y + at, value * inverse[:, None] * scale[None, :], mask=row < rows)


@triton.jit(do_not_specialize=["rows", "stride"], do_not_specialize_on_alignment=["weight"])
def normalise_backward(
    total, weight, d_total, d_y,
    d_x,  # of x and of what was added
    shares,  # (models, programs, COLUMNS): of the weight
    rows, stride, eps,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, COLUMNS)
    at = (model * rows + row) * COLUMNS + column[None, :]
    scale = tl.load(weight + model * stride + column)
    value = tl.load(total + at, mask=row < rows, other=0.0)
    grad = tl.load(d_y + at, mask=row < rows, other=0.0)
    through = tl.load(d_total + at, mask=row < rows, other=0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / COLUMNS + eps)[:, None]
    value *= inverse
    share = shares + (model * tl.num_programs(0) + tl.program_id(0)) * COLUMNS
    tl.store(share + column, tl.sum(grad * value, axis=0))
    grad *= scale[None, :]
    grad = inverse * (grad - value * (tl.sum(grad * value, axis=1) / COLUMNS)[:, None])
    tl.store(d_x + at, through + grad, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def embedding_backward(
    tokens,  # (models, rows) int64
    grads,  # (models, rows, COLUMNS)
    shares,  # (models, programs, vocabulary, COLUMNS)
    rows, vocabulary,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A program's share of the sums, for each of WORDS words, of the gradients of the rows where it stands."""
    model = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros([WORDS, COLUMNS], dtype=tl.float32)
    for first in range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE):
        row = first + tl.arange(0, TILE)
        token = tl.load(tokens + model * rows + row, mask=row < rows, other=-1).to(tl.int32)
        at = (model * rows + row)[:, None] * COLUMNS + column
        grad = tl.load(grads + at, mask=row[:, None] < rows, other=0.0)
        stands = (word[:, None] == token[None, :]).to(tl.float32)
        total = tl.dot(stands, grad, total, input_precision="tf32x3")
    shares += ((model * tl.num_programs(0) + tl.program_id(0)) * vocabulary + word)[:, None] * COLUMNS + column
    tl.store(shares, total, mask=word[:, None] < vocabulary)
