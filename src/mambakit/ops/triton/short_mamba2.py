"""Mamba-2 between its projections, for sequences of a few tokens: a warp holds a whole sequence in its registers.

The scan is its dual form, in which no state appears,

    y_t = sum over s <= t of (C_t . B_s) exp(a (dt_{s+1} + ... + dt_t)) dt_s x_s + D x_t

with the steps of time written out by the compiler, so that the convolution's shifts are a choice among registers.

The forward keeps the products C_t . B_s, a number for each pair of tokens. With them the backward falls in two that
share no channels: `mix_backward_values` needs no keys, and leaves the products' gradients to `mix_backward_keys`, for
which a few keys are enough at once. Both form what they need again from what the in-projection gave. A program goes
from sequence to sequence of its model and keeps its share of the parameters' gradients; the shares are added
afterwards, in a fixed order.
"""

import triton
import triton.language as tl

from mambakit.ops.triton.short_mamba2_tokens import (
    convolve_backward,
    convolved,
    decays_of,
    put,
    rows_of,
    sigmoid_of,
    steps_of,
    taps_of,
    zeros,
)

_NUMBERS = ["batch", "stride_weight", "stride_bias", "stride_dt", "stride_A", "stride_D", "stride_norm"]
# Parts of a larger tensor, which begin anywhere: no kernel of its own for each way that they are aligned.
_ANYWHERE = ["conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight"]


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
    taps_x, bias_x = taps_of(conv_weight + inner * TAPS, TAPS), tl.load(conv_bias + inner)
    taps_B, bias_B = taps_of(conv_weight + (INNER + key) * TAPS, TAPS), tl.load(conv_bias + INNER + key)
    taps_C, bias_C = taps_of(conv_weight + (INNER + STATE + key) * TAPS, TAPS), tl.load(conv_bias + INNER + STATE + key)
    rate = -tl.exp(tl.load(A_log + model * stride_A))
    bias, skip = tl.load(dt_bias + model * stride_dt), tl.load(D + model * stride_D)
    scale = tl.load(norm_weight + model * stride_norm + inner)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z = projected + row * WIDTH
        u = z + INNER
        given_C = rows_of(u + INNER + STATE + key, LENGTH, WIDTH)
        B, _, _ = convolved(rows_of(u + INNER + key, LENGTH, WIDTH), taps_B, bias_B, LENGTH, TAPS, PATH, FAST)
        C, _, _ = convolved(given_C, taps_C, bias_C, LENGTH, TAPS, PATH, FAST)
        mixing = ()  # a tuple of each token's
        for t in tl.static_range(LENGTH):
            of_token = ()
            for s in tl.static_range(t + 1):
                of_token = of_token + (tl.sum(C[t] * B[s]),)
            mixing = mixing + (of_token,)
        _, steps, kept = steps_of(u + CONVOLVED, bias, rate, LENGTH, WIDTH, FAST)
        gates = rows_of(z + inner, LENGTH, WIDTH)
        x, _, _ = convolved(rows_of(u + inner, LENGTH, WIDTH), taps_x, bias_x, LENGTH, TAPS, PATH, FAST)
        pairs = products + row * LENGTH
        for t in tl.static_range(LENGTH):
            y = skip * x[t]
            decays = decays_of(kept, t)
            for s in tl.static_range(t + 1):
                tl.store(pairs + (t * LENGTH + s), mixing[t][s])
                y += mixing[t][s] * decays[s] * steps[s] * x[s]
            y *= gates[t] * sigmoid_of(gates[t], FAST)
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
    taps = taps_of(conv_weight + model * stride_weight + inner * TAPS, TAPS)
    bias_x = tl.load(conv_bias + model * stride_bias + inner)
    rate = -tl.exp(tl.load(A_log + model * stride_A))
    bias, skip = tl.load(dt_bias + model * stride_dt), tl.load(D + model * stride_D)
    scale = tl.load(norm_weight + model * stride_norm + inner)

    d_bias, d_A_log, d_skip = 0.0, 0.0, 0.0
    d_scale = tl.zeros([INNER], dtype=tl.float32)
    d_taps, d_bias_x = zeros(TAPS, INNER), tl.zeros([INNER], dtype=tl.float32)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        z, d_z = projected + row * WIDTH, d_projected + row * WIDTH
        u, d_u = z + INNER, d_z + INNER
        pairs, d_pairs = products + row * LENGTH, d_products + row * LENGTH
        given = rows_of(u + inner, LENGTH, WIDTH)
        gates = rows_of(z + inner, LENGTH, WIDTH)
        grads = rows_of(d_out + row * INNER + inner, LENGTH, INNER)
        raw, steps, kept = steps_of(u + CONVOLVED, bias, rate, LENGTH, WIDTH, FAST)
        x, silus, slopes = convolved(given, taps, bias_x, LENGTH, TAPS, PATH, FAST)
        d_x = zeros(LENGTH, INNER)
        d_steps, d_sums = (), ()  # sums: of the decays' logarithms up to a token
        for _ in tl.static_range(LENGTH):
            d_steps, d_sums = d_steps + (0.0,), d_sums + (0.0,)
        for t in tl.static_range(LENGTH):
            decays = decays_of(kept, t)
            unscaled = ()  # by dt
            y = skip * x[t]
            for s in tl.static_range(t + 1):
                unscaled = unscaled + (tl.load(pairs + (t * LENGTH + s)) * decays[s],)
                y += unscaled[s] * steps[s] * x[s]

            # the gate and the norm
            gate = gates[t]
            sigmoid = sigmoid_of(gate, FAST)
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
            d_x = put(d_x, t, d_x[t] + skip * d_y, LENGTH)
            for s in tl.static_range(t + 1):
                d_mixing = tl.sum(d_y * x[s])
                if s == t:
                    d_skip += d_mixing
                mixing = unscaled[s] * steps[s]
                d_x = put(d_x, s, d_x[s] + mixing * d_y, LENGTH)
                tl.store(d_pairs + (t * LENGTH + s), d_mixing * decays[s] * steps[s])
                d_steps = put(d_steps, s, d_steps[s] + d_mixing * unscaled[s], LENGTH)
                d_sums = put(d_sums, t, d_sums[t] + d_mixing * mixing, LENGTH)
                d_sums = put(d_sums, s, d_sums[s] - d_mixing * mixing, LENGTH)

        # the steps
        d_log = 0.0  # of every sum that a step is in
        for t in tl.static_range(LENGTH - 1, -1, -1):
            d_log += d_sums[t]
            d_A_log += d_log * steps[t] * rate
            d_raw = (d_steps[t] + d_log * rate) * sigmoid_of(raw[t], FAST)
            d_bias += d_raw
            tl.store(d_u + t * WIDTH + CONVOLVED + filling, tl.where(filling == 0, d_raw, 0.0), mask=filling < FILLED)
        d_taps, d_bias_x = convolve_backward(
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
    taps_B, bias_B = taps_of(conv_weight + of_B * TAPS, TAPS), tl.load(conv_bias + of_B)
    taps_C, bias_C = taps_of(conv_weight + of_C * TAPS, TAPS), tl.load(conv_bias + of_C)
    d_taps_B, d_bias_B = zeros(TAPS, KEYS), tl.zeros([KEYS], dtype=tl.float32)
    d_taps_C, d_bias_C = zeros(TAPS, KEYS), tl.zeros([KEYS], dtype=tl.float32)
    for sequence in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = (model * batch + sequence) * LENGTH
        u, d_u = projected + row * WIDTH + INNER, d_projected + row * WIDTH + INNER
        d_pairs = d_products + row * LENGTH
        given_B, given_C = rows_of(u + of_B, LENGTH, WIDTH), rows_of(u + of_C, LENGTH, WIDTH)
        B, silus_B, slopes_B = convolved(given_B, taps_B, bias_B, LENGTH, TAPS, PATH, FAST)
        C, silus_C, slopes_C = convolved(given_C, taps_C, bias_C, LENGTH, TAPS, PATH, FAST)
        d_B, d_C = zeros(LENGTH, KEYS), ()
        for t in tl.static_range(LENGTH):
            grad = tl.zeros([KEYS], dtype=tl.float32)
            for s in tl.static_range(t + 1):
                d_product = tl.load(d_pairs + (t * LENGTH + s))
                grad += d_product * B[s]
                d_B = put(d_B, s, d_B[s] + d_product * C[t], LENGTH)
            d_C = d_C + (grad,)
        d_taps_B, d_bias_B = convolve_backward(
            d_B, given_B, silus_B, slopes_B, d_u + of_B, taps_B, d_taps_B, d_bias_B, LENGTH, WIDTH, TAPS, PATH
        )
        d_taps_C, d_bias_C = convolve_backward(
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
