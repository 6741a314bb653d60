// One step of a head's matrix of state, that of Mamba-2 and Mamba-3.
#pragma once

#include "matvec.hpp"
#include "parts.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// What enters a state: rows of weights and of keys, `count` of each.
struct OuterProducts {
  const float *weights, *keys;  // (count, rows of the state) and (count, columns of the state)
  int64_t count, weight_stride, key_stride;
};

// h = decay h + sum_j weight_j key_j^T for a tile of R rows and C vectors of columns from the corner `h` on, of which
// `left` columns exist.
template <int R, int C>
MAMBAKIT_INLINE void advance_tile(float *h, int64_t size, int64_t left, float decay, const float *weights,
                                  const float *keys, const OuterProducts &in) {
  constexpr int V = lanes<float>;
  Vec<float> state[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) state[r][c] = fill(decay) * load_some(h + r * size + c * V, left - c * V);
  for (int64_t j = 0; j < in.count; ++j) {
    Vec<float> key[C];
    for (int c = 0; c < C; ++c) key[c] = load_some(keys + j * in.key_stride + c * V, left - c * V);
    for (int r = 0; r < R; ++r) {
      const Vec<float> weight = fill(weights[j * in.weight_stride + r]);
      for (int c = 0; c < C; ++c) state[r][c] = state[r][c] + weight * key[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store_some(h + r * size + c * V, state[r][c], left - c * V);
}

template <int R>
MAMBAKIT_INLINE void advance_rows(float *h, int64_t row, int64_t size, float decay, const OuterProducts &in) {
  constexpr int V = lanes<float>;
  const float *weights = in.weights + row;
  h += row * size;
  int64_t n = 0;
  for (; n + 2 * V <= size; n += 2 * V) advance_tile<R, 2>(h + n, size, 2 * V, decay, weights, in.keys + n, in);
  for (; n < size; n += V) advance_tile<R, 1>(h + n, size, size - n, decay, weights, in.keys + n, in);
}

// Advances a state h (rows, size) and reads it: y[q * rows + row] = h[row] . query_q.
MAMBAKIT_INLINE void advance_state(float *h, int64_t rows, int64_t size, float decay, const OuterProducts &in,
                                   const Columns &queries, float *y) {
  constexpr int tile = 4;
  constexpr int64_t block = 4 * tile;  // rows that are still in the first-level cache when they are read
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = first + block < rows ? first + block : rows;
    int64_t row = first;
    for (; row + tile <= last; row += tile) advance_rows<tile>(h, row, size, decay, in);
    for (; row < last; ++row) advance_rows<1>(h, row, size, decay, in);
    multiply({h, nullptr, Encoding::float32, rows, size}, first, last - first, queries, y + first, rows);
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
