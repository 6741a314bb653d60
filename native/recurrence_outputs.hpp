// From the rows of a chunk to its outputs: y by the state before it and by the chunk's own steps, then D and the gate.
//
//     y_t = start_t S q_t + sum_j mixed_tj v_j + D v_t,    out_t = sum over ranks of down (y_t silu(gate z_t))
#pragma once

#include "recurrence_keys.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// y (rows, channels) of a chunk, D v among it. `turned_q` is q^T (columns, row_columns); `from_state`
// (headdim, row_columns) is working memory. y has room for row_columns rows.
template <typename S>
void outputs_of_chunk(const Sizes<S> &z, int64_t rows, const Weights<S> &w, const S *h, const S *turned_q,
                      const S *mixed, const S *v, const S *D, S *from_state, S *y) {
  const int64_t used = whole_vectors<S>(rows);
  multiply(z.headdim, used, z.columns, Factor<S>{h, z.columns, 1}, turned_q, z.row_columns,
           Result<S>{from_state, z.row_columns, Into::fresh, S(1)});
  transpose(from_state, z.row_columns, z.headdim, used, y, z.channels);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < z.channels; c += lanes<S>) {
      S *target = y + t * z.channels + c;
      store(target, load(target) * fill(w.start[t]) + load(D + c) * load(v + t * z.channels + c));
    }
  const Causal causal{z.rank, rows};
  multiply(rows, z.channels, Factor<S>{mixed, z.row_columns, 1}, v, z.channels,
           Result<S>{y, z.channels, Into::sum, S(1)},
           [causal](int64_t, int64_t end_row, int64_t, int64_t) { return Range{0, causal.end_of_step(end_row)}; });
}

// The state after a chunk from that before it; `scaled` (rows, channels) is working memory.
template <typename S>
void advance_state(const Sizes<S> &z, int64_t rows, const Weights<S> &w, const Keys<S> &keys, const S *v, S *scaled,
                   S *h) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < z.channels; c += lanes<S>)
      store(scaled + j * z.channels + c, load(v + j * z.channels + c) * fill(w.end[j] * w.scale[j]));
  multiply(z.headdim, z.columns, rows, Factor<S>{scaled, 1, z.channels}, keys.k, keys.stride,
           Result<S>{h, z.columns, Into::scaled, w.whole(rows)});
}

// silu(gate z) for every row of a step, and z itself.
template <typename T, typename S>
void read_gates(const LinearRecurrence &p, const Sizes<S> &z, const Chunk &c, int64_t step, int64_t head,
                const HeadWeights<S> &weights, S *z_row, S *gates) {
  read_row(row_of<const T>(p.z, c.entry, c.start + step, 0, head), int(z.headdim), int(z.channels), z_row);
  for (int64_t r = 0; r < z.rank; ++r)
    for (int64_t i = 0; i < z.channels; i += lanes<S>) {
      const Vec<S> x = load(z_row + i) * load(weights.gate + r * z.channels + i);
      store(gates + r * z.channels + i, x * sigmoid<S>(x));
    }
}

// Gates y and writes it; `row` (rank + 1, channels) is working memory.
template <typename T, typename S>
void write_outputs(const LinearRecurrence &p, const Sizes<S> &z, const Chunk &c, int64_t head,
                   const HeadWeights<S> &weights, S *y, S *row) {
  const int64_t K = z.channels;
  for (int64_t i = 0; i < c.steps; ++i) {
    S *rows = y + i * z.rank * K;
    if (p.z.data) {
      S *gates = row + K;
      read_gates<T>(p, z, c, i, head, weights, row, gates);
      for (int64_t n = 0; n < z.rank * K; n += lanes<S>) store(rows + n, load(rows + n) * load(gates + n));
    }
    if (!p.down) {
      for (int64_t r = 0; r < z.rank; ++r)
        write_row(rows + r * K, int(z.headdim), row_of<T>(p.y, c.entry, c.start + i, r, head));
      continue;
    }
    for (int64_t n = 0; n < K; n += lanes<S>) {
      Vec<S> sum = fill(S(0));
      for (int64_t r = 0; r < z.rank; ++r) sum = sum + load(rows + r * K + n) * load(weights.down + r * K + n);
      store(row + n, sum);
    }
    write_row(row, int(z.headdim), row_of<T>(p.y, c.entry, c.start + i, 0, head));
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
