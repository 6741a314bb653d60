// The steps of the recurrence's backward beside its products: gates, weights between steps, rotations.
#pragma once

#include "recurrence_outputs.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// Sums over a chunk of the gradients of what a head holds for all of time, null where it holds none; they are added up
// chunk by chunk in the end.
template <typename S>
struct Sums {
  S *D, *up, *gate, *down, *B_bias, *C_bias;
  int64_t size;

  Sums(S *memory, const LinearRecurrence &p, const Sizes<S> &z) {
    Arena<S> arena(memory);
    const auto take = [&](const void *given, int64_t count) { return given ? arena.take(count) : nullptr; };
    D = take(p.D, z.channels);
    up = take(p.up, z.rank * z.channels);
    gate = take(p.gate, z.rank * z.channels);
    down = take(p.down, z.rank * z.channels);
    B_bias = take(p.B_bias, z.rank * z.columns);
    C_bias = take(p.C_bias, z.rank * z.columns);
    size = arena.used();
  }
};

template <typename S>
MAMBAKIT_INLINE void add_product(S *sum, const S *a, const S *b, int64_t size) {
  for (int64_t i = 0; i < size; i += lanes<S>) store(sum + i, load(sum + i) + load(a + i) * load(b + i));
}

template <typename S>
MAMBAKIT_INLINE S dot(const S *a, const S *b, int64_t size) {  // of whole vectors
  Vec<S> first = fill(S(0)), second = fill(S(0));
  int64_t i = 0;
  for (; i + 2 * lanes<S> <= size; i += 2 * lanes<S>) {
    first = first + load(a + i) * load(b + i);
    second = second + load(a + i + lanes<S>) * load(b + i + lanes<S>);
  }
  for (; i < size; i += lanes<S>) first = first + load(a + i) * load(b + i);
  return sum_of_lanes<S>(first + second);
}

// dy (rows, channels), of y before its gate; `row` (rank + 1, channels) is working memory.
template <typename T, typename S>
void read_output_gradients(const LinearRecurrence &p, const Rows &grad_y, const Sizes<S> &z, const Chunk &c,
                           int64_t head, const HeadWeights<S> &weights, S *dy, S *row) {
  const int64_t K = z.channels;
  for (int64_t i = 0; i < c.steps; ++i) {
    S *rows = dy + i * z.rank * K;
    for (int64_t r = 0; r < z.rank; ++r)
      read_row(row_of<const T>(grad_y, c.entry, c.start + i, p.down ? 0 : r, head), int(z.headdim), int(K),
               rows + r * K);
    if (p.down)
      for (int64_t n = 0; n < z.rank * K; n += lanes<S>) store(rows + n, load(rows + n) * load(weights.down + n));
    if (!p.z.data) continue;
    read_gates<T>(p, z, c, i, head, weights, row, row + K);
    for (int64_t n = 0; n < z.rank * K; n += lanes<S>) store(rows + n, load(rows + n) * load(row + K + n));
  }
}

// Gradients of z, gate and down from y (rows, channels) before its gate; `row` (3, channels) is working memory.
template <typename T, typename S>
void gate_gradients(const LinearRecurrenceBackward &b, const Sizes<S> &z, const Chunk &c, int64_t head,
                    const HeadWeights<S> &weights, const S *y, const Sums<S> &sums, S *row) {
  const LinearRecurrence &p = b.forward;
  const int64_t K = z.channels;
  S *z_row = row, *dout = row + K, *dz = row + 2 * K;
  const Vec<S> one = fill(S(1));
  for (int64_t i = 0; i < c.steps; ++i) {
    if (p.z.data) read_row(row_of<const T>(p.z, c.entry, c.start + i, 0, head), int(z.headdim), int(K), z_row);
    for (int64_t n = 0; n < K; ++n) dz[n] = S(0);
    for (int64_t r = 0; r < z.rank; ++r) {
      if (r == 0 || !p.down)
        read_row(row_of<const T>(b.grad_y, c.entry, c.start + i, p.down ? 0 : r, head), int(z.headdim), int(K), dout);
      for (int64_t n = 0; n < K; n += lanes<S>) {
        const Vec<S> out = load(dout + n) * load(y + (i * z.rank + r) * K + n);
        Vec<S> gate = one;
        if (p.z.data) {
          const Vec<S> weight = load(weights.gate + r * K + n), x = load(z_row + n) * weight, on = sigmoid<S>(x);
          gate = x * on;
          const Vec<S> dx = out * load(weights.down + r * K + n) * (on * (one + x * (one - on)));
          store(dz + n, load(dz + n) + dx * weight);
          if (p.gate) store(sums.gate + r * K + n, load(sums.gate + r * K + n) + dx * load(z_row + n));
        }
        if (p.down) store(sums.down + r * K + n, load(sums.down + r * K + n) + out * gate);
      }
    }
    if (p.z.data) write_row(dz, int(z.headdim), row_of<T>(b.grad_z, c.entry, c.start + i, 0, head));
  }
}

// Gradients of x, up and D from those of y and of v (rows, channels), which gets what D adds.
template <typename T, typename S>
void value_gradients(const LinearRecurrenceBackward &b, const Sizes<S> &z, const Chunk &c, int64_t head,
                     const HeadWeights<S> &weights, const S *dy, const S *v, S *dv, const Sums<S> &sums, S *row) {
  const LinearRecurrence &p = b.forward;
  const int64_t K = z.channels;
  for (int64_t i = 0; i < c.steps; ++i) {
    S *rows = dv + i * z.rank * K;
    const int64_t first = i * z.rank * K;
    for (int64_t r = 0; p.D && r < z.rank; ++r) {
      add_product(rows + r * K, weights.D, dy + first + r * K, K);
      add_product(sums.D, dy + first + r * K, v + first + r * K, K);
    }
    if (p.up) {
      read_row(row_of<const T>(p.x, c.entry, c.start + i, 0, head), int(z.headdim), int(K), row);
      for (int64_t r = 0; r < z.rank; ++r) add_product(sums.up + r * K, rows + r * K, row, K);
    }
    for (int64_t n = 0; n < K; n += lanes<S>) {
      Vec<S> sum = load(rows + n) * load(weights.up + n);
      for (int64_t r = 1; r < z.rank; ++r) sum = sum + load(rows + r * K + n) * load(weights.up + r * K + n);
      store(row + n, sum);
    }
    write_row(row, int(z.headdim), row_of<T>(b.grad_x, c.entry, c.start + i, 0, head));
  }
}

// Gradients of a chunk's weights, each (rows): of scale, own, and of the logarithm of a step's decay, where those of
// a step's ranks are to be summed.
template <typename S>
struct WeightGradients {
  S *scale, *own, *log_decay, *later;

  WeightGradients(Arena<S> &arena, const Sizes<S> &z)
      : scale(arena.take(z.row_columns)), own(arena.take(z.row_columns)), log_decay(arena.take(z.row_columns)),
        later(arena.take(z.row_columns)) {}
};

// From the gradient of `mixed` (rows, row_columns), which becomes that of the scores. The decay of a step stands
// between every earlier and every later one: `later_j` sums over the later ones, downwards.
template <typename S>
void weigh_backward(const Weights<S> &w, int64_t rank, int64_t rows, const S *scores, S *dmixed,
                    const WeightGradients<S> &g) {
  const int64_t stride = w.stride;
  for (int64_t j = 0; j < stride; ++j) g.scale[j] = g.own[j] = g.log_decay[j] = g.later[j] = S(0);
  for (int64_t t = rows - 1; t >= 0; --t) {
    const int64_t begin = t / rank * rank, end = begin + rank;
    const S *e = w.decay + t * stride, *score = scores + t * stride, *scale = w.scale;
    S *d = dmixed + t * stride, *dscale = g.scale, *later = g.later;
    for (int64_t j = begin; j < end; ++j) {
      g.own[t] += d[j] * score[j];
      d[j] *= w.own[j];
    }
    for (int64_t j = end; j < stride; ++j) d[j] = S(0);
    for (int64_t j = 0; j < begin; ++j) {
      const S decayed = d[j] * e[j], product = decayed * score[j];
      dscale[j] += product;
      later[j] += product * scale[j];
      d[j] = decayed * scale[j];
    }
    if (t != begin) continue;
    int64_t j = 0;
    Vec<S> sums = fill(S(0));
    for (; j + lanes<S> <= begin; j += lanes<S>) sums = sums + load(later + j);
    S sum = sum_of_lanes<S>(sums);
    for (; j < begin; ++j) sum += later[j];
    g.log_decay[t] = sum;
  }
}

// Adds what passes through the states, and writes the gradients of the chunk's steps. dv (headdim, row_columns) holds
// the product of the gradient of the state after the chunk with the keys, and gets its weights; `from_start` (rows) is
// q . dq of the state before; `across` is the product of the two states and the whole decay.
template <typename S>
void state_weight_gradients(const LinearRecurrenceBackward &b, const Sizes<S> &z, const Chunk &c, int64_t head,
                            const Weights<S> &w, const S *turned_v, S *dv, const S *from_start, S across,
                            const WeightGradients<S> &g) {
  const LinearRecurrence &p = b.forward;
  const int64_t rows = c.steps * z.rank;
  S *entering = g.later;  // v . (dS k) of every row
  for (int64_t j = 0; j < whole_vectors<S>(rows); j += lanes<S>) {
    const Vec<S> weight = load(w.end + j) * load(w.scale + j);
    Vec<S> sum = fill(S(0));
    for (int64_t n = 0; n < z.headdim; ++n) {
      const Vec<S> value = load(dv + n * z.row_columns + j);
      sum = sum + value * load(turned_v + n * z.row_columns + j);
      store(dv + n * z.row_columns + j, value * weight);
    }
    store(entering + j, sum);
  }
  S earlier = across;
  for (int64_t i = 0; i < c.steps; ++i) {
    g.log_decay[i * z.rank] += earlier;
    for (int64_t row = i * z.rank; row < (i + 1) * z.rank; ++row) {
      g.scale[row] += w.end[row] * entering[row];
      earlier += w.end[row] * w.scale[row] * entering[row];
    }
  }
  S later = S(0);
  for (int64_t i = c.steps - 1; i >= 0; --i) {
    S scale = S(0), own = S(0);
    for (int64_t row = i * z.rank; row < (i + 1) * z.rank; ++row) {
      later += from_start[row];
      scale += g.scale[row];
      own += g.own[row];
    }
    const auto out = [&](void *values) { return const_cast<S *>(of_step<S>(values, p, c.entry, c.start + i, head)); };
    *out(b.grad_log_decay) = g.log_decay[i * z.rank] + later;
    if (p.own) *out(b.grad_own) = own;
    *out(b.grad_scale) = p.own ? scale : scale + own;
  }
}

// Turns the gradients of keys and queries (rows, columns) back and adds them to those of B and C and of the biases;
// `dangle` gets the gradient of each step's angles, `angle_stride` apart.
template <typename S>
void turn_back(const Sizes<S> &z, const Chunk &c, const TurnedKeys<S> &keys, const S *dk, const S *dq, S *dB, S *dC,
               const Sums<S> &sums, S *dangle, int64_t angle_stride) {
  constexpr int V = lanes<S>;
  for (int64_t i = 0; i < c.steps; ++i) {
    S *angle = dangle + i * angle_stride;
    for (int64_t n = 0; n < z.half; ++n) angle[n] = S(0);
    for (int64_t r = 0; r < z.rank; ++r)
      for (int which = 0; which < 2; ++which) {
        const int64_t row = (i * z.rank + r) * z.columns;
        const S *d = (which == 0 ? dk : dq) + row, *turned = (which == 0 ? keys.k : keys.q) + row;
        S *to = (which == 0 ? dB : dC) + row, *bias = which == 0 ? sums.B_bias : sums.C_bias;
        const auto add = [&](int64_t n, Vec<S> value) {
          store(to + n, load(to + n) + value);
          if (bias) store(bias + r * z.columns + n, load(bias + r * z.columns + n) + value);
        };
        for (int64_t n = 0; n < z.half; n += V) {
          const Vec<S> first = load(d + n), second = load(d + z.half + n);
          const Vec<S> sin = load(keys.sine + i * z.half + n), cos = load(keys.cosine + i * z.half + n);
          store(angle + n, load(angle + n) + second * load(turned + n) - first * load(turned + z.half + n));
          add(n, first * cos + second * sin);
          add(z.half + n, second * cos - first * sin);
        }
        for (int64_t n = 2 * z.half; n < z.columns; n += V) add(n, load(d + n));
      }
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
