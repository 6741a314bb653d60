// Rows of a matrix as vectors of float, whichever way its weights are stored.
//
// A reader gives `piece` columns at a time. `line` columns are what its user takes in one go: the least number of bytes
// that fill lines of the cache, and two vectors at least.
#pragma once

#include "matrix.hpp"
#include "parts.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

template <typename T>
struct PlainRows {
  static constexpr int piece = lanes<float>;
  static constexpr bool whole = false;  // whether rows are made of whole pieces
  static constexpr int line = 2 * piece > 64 / int(sizeof(T)) ? 2 * piece : 64 / int(sizeof(T));
  static constexpr int line_bytes = line * int(sizeof(T));
  const T *data;
  int64_t size;

  PlainRows(const T *data, int64_t size) : data(data), size(size) {}
  explicit PlainRows(const Matrix &m) : PlainRows(static_cast<const T *>(m.data), m.size) {}

  MAMBAKIT_INLINE PlainRows from(int64_t row) const { return {data + row * size, size}; }
  MAMBAKIT_INLINE const void *address(int64_t row, int64_t column) const { return data + row * size + column; }
  MAMBAKIT_INLINE void read(int64_t row, int64_t column, Vec<float> *values) const {
    values[0] = load_wide(data + row * size + column);
  }
  // The last columns of a row, zeros after them.
  MAMBAKIT_INLINE void read_end(int64_t row, int64_t column, Vec<float> *values) const {
    values[0] = load_part(data + row * size + column, int(size - column));
  }
  // What the values of a row still have to be multiplied by.
  MAMBAKIT_INLINE float factor(int64_t) const { return 1.0f; }
};

struct Int8Rows : PlainRows<int8_t> {
  const float *scales;

  Int8Rows(const PlainRows<int8_t> &values, const float *scales) : PlainRows<int8_t>(values), scales(scales) {}
  explicit Int8Rows(const Matrix &m) : Int8Rows(PlainRows<int8_t>(m), static_cast<const float *>(m.scales)) {}

  MAMBAKIT_INLINE Int8Rows from(int64_t row) const { return {PlainRows<int8_t>::from(row), scales + row}; }
  MAMBAKIT_INLINE float factor(int64_t row) const { return scales[row]; }
};

struct Int4Rows {
  static constexpr int piece = int4_group;
  static constexpr bool whole = true;
  static constexpr int line = 128;
  static constexpr int line_bytes = line / 2;
  const uint8_t *data;
  const bfloat16 *scales;
  int64_t size;

  Int4Rows(const uint8_t *data, const bfloat16 *scales, int64_t size) : data(data), scales(scales), size(size) {}
  explicit Int4Rows(const Matrix &m)
      : Int4Rows(static_cast<const uint8_t *>(m.data), static_cast<const bfloat16 *>(m.scales), m.size) {}

  MAMBAKIT_INLINE Int4Rows from(int64_t row) const {
    return {data + row * size / 2, scales + row * size / piece, size};
  }
  MAMBAKIT_INLINE const void *address(int64_t row, int64_t column) const { return data + (row * size + column) / 2; }
  MAMBAKIT_INLINE void read(int64_t row, int64_t column, Vec<float> *values) const {
    const int64_t at = row * size + column;
    const uint8_t *pairs = data + at / 2;
    const Vec<float> scale = fill(widen(scales[at / piece]));
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
    // A permutation looks at the low four bits of an index and so needs no mask.
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i low = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(pairs)));
    values[0] = scale * (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, low, table);
    values[1] = scale * (Vec<float>)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, low, 4), table);
#elif defined(__AVX2__) && !defined(MAMBAKIT_PLAIN_VECTORS)
    for (int half = 0; half < 2; ++half) {
      const __m256i both =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(pairs + 8 * half)));
      const __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(15)), high = _mm256_srli_epi32(both, 4);
      const __m256i middle = _mm256_set1_epi32(8);
      values[half] = scale * (Vec<float>)_mm256_cvtepi32_ps(_mm256_sub_epi32(low, middle));
      values[2 + half] = scale * (Vec<float>)_mm256_cvtepi32_ps(_mm256_sub_epi32(high, middle));
    }
#else
    float row_of_group[piece];
    for (int j = 0; j < piece / 2; ++j) {
      row_of_group[j] = float(int(pairs[j] & 15) - 8);
      row_of_group[j + piece / 2] = float(int(pairs[j] >> 4) - 8);
    }
    for (int j = 0; j < piece / lanes<float>; ++j) values[j] = scale * load(row_of_group + j * lanes<float>);
#endif
  }
  MAMBAKIT_INLINE float factor(int64_t) const { return 1.0f; }
};

// Calls `use` with a reader of the matrix from the row `first` on.
template <typename Use>
MAMBAKIT_INLINE void with_rows(const Matrix &m, int64_t first, const Use &use) {
  switch (m.encoding) {
    case Encoding::float32: return use(PlainRows<float>(m).from(first));
    case Encoding::bfloat16: return use(PlainRows<bfloat16>(m).from(first));
    case Encoding::float16: return use(PlainRows<float16>(m).from(first));
    case Encoding::int8: return use(Int8Rows(m).from(first));
    case Encoding::int4: return use(Int4Rows(m).from(first));
  }
}

// y (size) = one row.
MAMBAKIT_INLINE void read_matrix_row(const Matrix &m, int64_t row, float *y) {
  with_rows(m, row, [&](const auto &rows) {
    constexpr int piece = rows.piece, V = lanes<float>;
    const Vec<float> factor = fill(rows.factor(0));
    Vec<float> values[piece / V];
    int64_t i = 0;
    for (; i + piece <= m.size; i += piece) {
      rows.read(0, i, values);
      for (int p = 0; p < piece / V; ++p) store(y + i + p * V, factor * values[p]);
    }
    if constexpr (!rows.whole) {
      if (i == m.size) return;
      rows.read_end(0, i, values);
      store_part(y + i, factor * values[0], int(m.size - i));
    }
  });
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
