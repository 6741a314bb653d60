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

// R rows of a state h (rows, size): h = decay h + sum_j weight_j key_j^T.
template <int R>
MAMBAKIT_INLINE void advance_rows(float *h, int64_t row, int64_t size, float decay, const OuterProducts &in) {
  for (int64_t n = 0; n < size; n += lanes<float>) {
    const int64_t left = size - n;
    Vec<float> state[R];
    for (int r = 0; r < R; ++r) state[r] = fill(decay) * load_some(h + (row + r) * size + n, left);
    for (int64_t j = 0; j < in.count; ++j) {
      const Vec<float> key = load_some(in.keys + j * in.key_stride + n, left);
      const float *weight = in.weights + j * in.weight_stride + row;
      for (int r = 0; r < R; ++r) state[r] = state[r] + fill(weight[r]) * key;
    }
    for (int r = 0; r < R; ++r) store_some(h + (row + r) * size + n, state[r], left);
  }
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
    multiply(h, Dtype::float32, size, first, last - first, queries, y + first, rows);
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
