// Keys and queries of the recurrence: B and C as they are for a whole group, or for each head with a bias and turned.
//
//     k = Rot(theta) (B + B_bias),   q = Rot(theta) (C + C_bias),   theta_t = theta_{t-1} + speed_t step_t
//
// The turned coordinates stand in an order of their own (`Sizes::place`), in which a rotation is arithmetic on whole
// vectors. Angles are summed in double: a million turns of one radian leave float with no digit behind the point.
#pragma once

#include "recurrence_chunk.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// B and C in the type of sums, their coordinates in place: rows (entry, time, rank) of (groups, columns).
template <typename S>
struct SpreadKeys {
  SpreadKeys(const LinearRecurrence &p, const Sizes<S> &z)
      : sizes(z), length(p.sequences.length), memory(2, rows(p) * z.groups * z.columns) {}

  static int64_t rows(const LinearRecurrence &p) { return p.sequences.batch * p.sequences.length * p.rank; }
  int64_t stride() const { return sizes.groups * sizes.columns; }
  S *row(int which, int64_t entry, int64_t time, int64_t rank, int64_t group) const {
    return memory.part(which) + ((entry * length + time) * sizes.rank + rank) * stride() + group * sizes.columns;
  }

  template <typename T>
  void fill_in(const LinearRecurrence &p) const {
    const int64_t steps = p.sequences.batch * p.sequences.length, N = p.state;
    Scratch<S> in_order(p.threads, N);
    const Sizes<S> &z = sizes;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t i = 0; i < steps; ++i)
      for (int which = 0; which < 2; ++which)
        for (int64_t r = 0; r < p.rank; ++r)
          for (int64_t g = 0; g < p.groups; ++g) {
            const T *from = row_of<const T>(which == 0 ? p.B : p.C, i / length, i % length, r, g);
            S *to = row(which, i / length, i % length, r, g);
            if (p.pairs == 0) {
              read_row(from, int(N), int(z.columns), to);
              continue;
            }
            S *values = in_order.mine();
            read_row(from, int(N), int(N), values);
            for (int64_t n = 0; n < z.columns; ++n) to[n] = S(0);
            for (int64_t n = 0; n < N; ++n) to[z.place(n, p.interleaved)] = values[n];
          }
  }

  Sizes<S> sizes;
  int64_t length;
  Scratch<S> memory;
};

// sin and cos of an angle: quarter turns are taken off in double, the rest is at most pi / 4 and needs few terms.
MAMBAKIT_INLINE void sine_and_cosine(const double *angle, int64_t size, float *sine, float *cosine) {
  constexpr double quarters_of_radian = 0.63661977236758134308, quarter = 1.57079632679489661923;
  for (int64_t i = 0; i < size; ++i) {
    const double quarters = angle[i] * quarters_of_radian, whole = std::floor(quarters + 0.5);
    const float rest = float((quarters - whole) * quarter);
    // At angles beyond the digits of double the compiler's fused product may leave any rest.
    const float x = rest > 0.8f ? 0.8f : rest < -0.8f ? -0.8f : rest, z = x * x;
    const float turn = float(whole - 4.0 * std::floor(whole * 0.25));  // 0, 1, 2 or 3
    const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    const float c = 1.0f - 0.5f * z +
                    z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const bool swapped = turn == 1.0f || turn == 3.0f;
    const float first = swapped ? c : s, second = swapped ? s : c;
    sine[i] = turn >= 2.0f ? -first : first;
    cosine[i] = turn == 1.0f || turn == 2.0f ? -second : second;
  }
}
inline void sine_and_cosine(const double *angle, int64_t size, double *sine, double *cosine) {
  for (int64_t i = 0; i < size; ++i) sine[i] = std::sin(angle[i]), cosine[i] = std::cos(angle[i]);
}

template <typename S>
const S *speeds_of(const LinearRecurrence &p, int64_t entry, int64_t time, int64_t head) {
  return row_of<const S>(p.speeds, entry, time, 0, head);  // a stride of 0 where all heads share them
}

template <typename S>
void turn_on(const LinearRecurrence &p, int64_t entry, int64_t time, int64_t head, double *angle) {
  const S step = *of_step<S>(p.steps, p, entry, time, head);
  const S *speed = speeds_of<S>(p, entry, time, head);
  for (int64_t i = 0; i < p.pairs; ++i) angle[i] += double(speed[i] * step);
}

// The angles (half) before the first step of a sequence.
template <typename S>
void first_angles(const LinearRecurrence &p, const Sizes<S> &z, int64_t sequence, int64_t head, double *angle) {
  const S *initial = static_cast<const S *>(p.initial_angle);
  for (int64_t i = 0; i < z.half; ++i)
    angle[i] = initial && i < z.pairs ? double(initial[(sequence * z.heads + head) * z.pairs + i]) : 0.0;
}

// Keys and queries of one chunk and head: rows `stride` apart.
template <typename S>
struct Keys {
  const S *k, *q;
  int64_t stride;
};

// Room for those of a head that has its own, and its sines and cosines (steps, half).
template <typename S>
struct TurnedKeys {
  S *k, *q, *sine, *cosine, *bias;

  static bool needed(const LinearRecurrence &p) { return p.pairs > 0 || p.B_bias || p.C_bias; }

  TurnedKeys(Arena<S> &arena, const LinearRecurrence &p, const Sizes<S> &z) {
    const bool any = needed(p);
    k = arena.take(any ? z.rows * z.columns : 0);
    q = arena.take(any ? z.rows * z.columns : 0);
    sine = arena.take(any ? z.steps * z.half : 0);
    cosine = arena.take(any ? z.steps * z.half : 0);
    bias = arena.take(any ? 2 * z.rank * z.columns : 0);
  }

  void read_biases(const LinearRecurrence &p, const Sizes<S> &z, int64_t head) {
    const void *biases[2] = {p.B_bias, p.C_bias};
    for (int64_t i = 0; i < 2 * z.rank * z.columns; ++i) bias[i] = S(0);
    for (int which = 0; which < 2; ++which)
      for (int64_t r = 0; biases[which] && r < z.rank; ++r)
        for (int64_t n = 0; n < z.state; ++n)
          bias[(which * z.rank + r) * z.columns + z.place(n, p.interleaved)] =
              static_cast<const S *>(biases[which])[(head * z.rank + r) * z.state + n];
  }

  // Fills in k and q from the angles before the chunk, and leaves those after it. Biases must have been read.
  Keys<S> turn(const LinearRecurrence &p, const Sizes<S> &z, const SpreadKeys<S> &spread, const Chunk &c, int64_t head,
               double *angle) {
    constexpr int V = lanes<S>;
    const int64_t group = head / (p.heads / p.groups);
    for (int64_t i = 0; i < c.steps; ++i) {
      S *s = sine + i * z.half, *co = cosine + i * z.half;
      if (p.pairs) {
        turn_on<S>(p, c.entry, c.start + i, head, angle);
        sine_and_cosine(angle, z.half, s, co);
      }
      for (int which = 0; which < 2; ++which)
        for (int64_t r = 0; r < z.rank; ++r) {
          const S *from = spread.row(which, c.entry, c.start + i, r, group);
          const S *b = bias + (which * z.rank + r) * z.columns;
          S *to = (which == 0 ? k : q) + (i * z.rank + r) * z.columns;
          for (int64_t n = 0; n < z.half; n += V) {
            const Vec<S> first = load(from + n) + load(b + n), cos = load(co + n), sin = load(s + n);
            const Vec<S> second = load(from + z.half + n) + load(b + z.half + n);
            store(to + n, first * cos - second * sin);
            store(to + z.half + n, first * sin + second * cos);
          }
          for (int64_t n = 2 * z.half; n < z.columns; n += V) store(to + n, load(from + n) + load(b + n));
        }
    }
    return {k, q, z.columns};
  }
};

template <typename S>
Keys<S> shared_keys(const SpreadKeys<S> &spread, const Chunk &c, int64_t group) {
  return {spread.row(0, c.entry, c.start, 0, group), spread.row(1, c.entry, c.start, 0, group), spread.stride()};
}

// scores_tj = q_t . k_j (rows, row_columns) for the steps j up to t; `turned_k` (columns, row_columns) gets k^T.
template <typename S>
void score(const Sizes<S> &z, const Chunk &c, const Keys<S> &keys, S *turned_k, S *scores) {
  const int64_t rows = c.steps * z.rank;
  transpose(keys.k, keys.stride, rows, z.columns, turned_k, z.row_columns);
  const Causal causal{z.rank, rows};
  const auto columns = z.columns;
  const int64_t used = whole_vectors<S>(rows);
  multiply(rows, used, Factor<S>{keys.q, keys.stride, 1}, turned_k, z.row_columns,
           Result<S>{scores, z.row_columns, Into::fresh, S(1)},
           [causal, columns](int64_t, int64_t end_row, int64_t column, int64_t) {
             return Range{0, causal.begin_of_step(column) < causal.end_of_step(end_row) ? columns : 0};
           });
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
