// Small matrix products and transposes on arrays that lie in the caches, blocked for the registers.
//
//     C_ij = sum_l A_il B_lj,   l in the range that the caller gives for each block of C
//
// B and C have contiguous rows of whole vectors; A may lie either way round. A block of C stays in registers while its
// products are summed.
#pragma once

#include "vector.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

#if defined(__AVX512F__)
constexpr int block_rows = 8;
#else
constexpr int block_rows = 4;
#endif
constexpr int block_vectors = 2;

// Element (i, l) lies at data[i * row + l * column].
template <typename S>
struct Factor {
  const S *data;
  int64_t row, column;
};

template <int N>
struct Size {
  static constexpr int value = N;
};

enum class Into { fresh, sum, scaled };  // C = AB, C += AB, C = scale C + AB

template <typename S>
struct Result {
  S *data;
  int64_t stride;
  Into into = Into::fresh;
  S scale = S(1);
};

struct Range {
  int64_t begin, end;
};

// `Neighbours`: the rows of A lie side by side, at one address that counts up.
template <typename S, int M, int W, bool Neighbours>
void block_of_product(const S *a, int64_t a_row, int64_t a_column, const S *b, int64_t b_stride, Range range,
                      const Result<S> &c, int64_t row, int64_t column) {
  constexpr int V = lanes<S>;
  Vec<S> sums[M][W];
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) sums[m][w] = fill(S(0));
  a += row * a_row + range.begin * a_column;
  b += column + range.begin * b_stride;
  for (int64_t l = range.begin; l < range.end; ++l) {
    Vec<S> right[W];
    for (int w = 0; w < W; ++w) right[w] = load(b + w * V);
    for (int m = 0; m < M; ++m) {
      const Vec<S> left = fill(a[Neighbours ? m : m * a_row]);
      for (int w = 0; w < W; ++w) sums[m][w] = sums[m][w] + left * right[w];
    }
    a += a_column;
    b += b_stride;
  }
  S *out = c.data + row * c.stride + column;
  const Vec<S> scale = fill(c.scale);
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) {
      S *target = out + m * c.stride + w * V;
      if (c.into == Into::sum) sums[m][w] = load(target) + sums[m][w];
      if (c.into == Into::scaled) sums[m][w] = scale * load(target) + sums[m][w];
      store(target, sums[m][w]);
    }
}

template <typename S, int W, typename Ranges>
void panel_of_product(int64_t rows, const Factor<S> &a, const S *b, int64_t b_stride, const Result<S> &c,
                      int64_t column, const Ranges &ranges) {
  const auto block = [&](auto size, int64_t row) {
    constexpr int M = decltype(size)::value;
    const Range range = ranges(row, row + M, column, column + W * lanes<S>);
    if (a.row == 1) block_of_product<S, M, W, true>(a.data, 1, a.column, b, b_stride, range, c, row, column);
    else block_of_product<S, M, W, false>(a.data, a.row, a.column, b, b_stride, range, c, row, column);
  };
  int64_t row = 0;
  for (; row + block_rows <= rows; row += block_rows) block(Size<block_rows>{}, row);
  for (; row + 2 <= rows; row += 2) block(Size<2>{}, row);
  if (row < rows) block(Size<1>{}, row);
}

// `ranges(first row, end row, first column, end column)` is the range of l that a block of C needs.
template <typename S, typename Ranges>
void multiply(int64_t rows, int64_t columns, const Factor<S> &a, const S *b, int64_t b_stride, const Result<S> &c,
              const Ranges &ranges) {
  constexpr int V = lanes<S>;
  int64_t column = 0;
  for (; column + block_vectors * V <= columns; column += block_vectors * V)
    panel_of_product<S, block_vectors>(rows, a, b, b_stride, c, column, ranges);
  for (; column < columns; column += V) panel_of_product<S, 1>(rows, a, b, b_stride, c, column, ranges);
}

template <typename S>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Factor<S> &a, const S *b, int64_t b_stride,
              const Result<S> &c) {
  multiply(rows, columns, a, b, b_stride, c, [depth](int64_t, int64_t, int64_t, int64_t) { return Range{0, depth}; });
}

template <typename S>
MAMBAKIT_INLINE void transpose_block(const S *in, int64_t in_stride, int rows, S *out, int64_t out_stride) {
  constexpr int V = lanes<S>;
  for (int j = 0; j < V; ++j) {
    for (int i = 0; i < rows; ++i) out[j * out_stride + i] = in[i * in_stride + j];
    for (int i = rows; i < V; ++i) out[j * out_stride + i] = S(0);
  }
}
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
// Interleaving row i with row i + 8 four times is the transpose.
template <>
MAMBAKIT_INLINE void transpose_block<float>(const float *in, int64_t in_stride, int rows, float *out,
                                            int64_t out_stride) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __m512 from[16], to[16];
  for (int i = 0; i < 16; ++i) from[i] = i < rows ? _mm512_loadu_ps(in + i * in_stride) : _mm512_setzero_ps();
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm512_permutex2var_ps(from[i], low, from[i + 8]);
      to[2 * i + 1] = _mm512_permutex2var_ps(from[i], high, from[i + 8]);
    }
    for (int i = 0; i < 16; ++i) from[i] = to[i];
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * out_stride, from[i]);
}
#endif

// out (columns, rows rounded up to whole vectors) = the transpose of in (rows, columns), zeros where in has no row.
// Columns are whole vectors.
template <typename S>
void transpose(const S *in, int64_t in_stride, int64_t rows, int64_t columns, S *out, int64_t out_stride) {
  constexpr int V = lanes<S>;
  for (int64_t i = 0; i < rows; i += V)
    for (int64_t j = 0; j < columns; j += V)
      transpose_block(in + i * in_stride + j, in_stride, int(rows - i < V ? rows - i : V), out + j * out_stride + i,
                      out_stride);
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
