// Products of a matrix with a few vectors. Tiles of rows and vectors keep their sums in registers; the rows of a tile
// come from memory with the first vectors and from the first-level cache with the others.
#include "matvec.hpp"

#include "matrix_rows.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

constexpr int tile_rows = 4;
constexpr int tile_columns = MAMBAKIT_VECTOR_BYTES == 64 ? 4 : 2;  // of 32 or 16 registers, sums take half

// Asks for memory ahead of its use; the address need not exist.
MAMBAKIT_INLINE void prefetch(const void *address) {
#if !defined(_MSC_VER) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// Sums of a tile of R rows and C vectors. A small tile has each sum in two parts, to hide the latency of the adding.
template <int R, int C>
struct Sums {
  static constexpr int parts = R * C > tile_rows ? 1 : 2;
  Vec<float> sum[parts][R][C];

  // Adds the products of a piece of each row with a piece of each vector.
  template <typename Rows>
  MAMBAKIT_INLINE void add(const Rows &w, int64_t column, const float *x, int64_t x_stride) {
    constexpr int V = lanes<float>, pieces = Rows::piece / V;
    Vec<float> rows[R][pieces];
    for (int r = 0; r < R; ++r) w.read(r, column, rows[r]);
    for (int p = 0; p < pieces; ++p)
      for (int c = 0; c < C; ++c) {
        const Vec<float> values = load(x + c * x_stride + column + p * V);
        const int part = parts == 1 ? 0 : int(column / V + p) % parts;
        for (int r = 0; r < R; ++r) sum[part][r][c] = sum[part][r][c] + rows[r][p] * values;
      }
  }
};

template <int R, int C, typename Rows>
MAMBAKIT_INLINE void tile(const Rows &w, const float *x, int64_t x_stride, float *out, int64_t out_stride) {
  const int64_t size = w.size;
  Sums<R, C> sums;
  for (auto &part : sums.sum)
    for (auto &row : part)
      for (auto &sum : row) sum = fill(0.0f);
  int64_t i = 0;
  for (; i + Rows::line <= size; i += Rows::line) {
    for (int r = 0; r < R; ++r)  // of the next tile: the processor does not foresee where rows begin
      for (int byte = 0; byte < Rows::line_bytes; byte += 64)
        prefetch(static_cast<const char *>(w.address(r + R, i)) + byte);
    for (int k = 0; k < Rows::line; k += Rows::piece) sums.add(w, i + k, x, x_stride);
  }
  for (; i + Rows::piece <= size; i += Rows::piece) sums.add(w, i, x, x_stride);
  if constexpr (!Rows::whole)
    for (int r = 0; r < (i < size ? R : 0); ++r) {
      Vec<float> row;
      w.read_end(r, i, &row);
      for (int c = 0; c < C; ++c)
        sums.sum[0][r][c] = sums.sum[0][r][c] + row * load_part(x + c * x_stride + i, int(size - i));
    }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      Vec<float> total = sums.sum[0][r][c];
      for (int part = 1; part < sums.parts; ++part) total = total + sums.sum[part][r][c];
      out[c * out_stride + r] = sum_of_lanes<float>(total) * w.factor(r);
    }
}

template <int R, typename Rows>
MAMBAKIT_INLINE void tiles(const Rows &w, const Columns &x, float *out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + tile_columns <= x.count; c += tile_columns)
    tile<R, tile_columns>(w, x.data + c * x.stride, x.stride, out + c * out_stride, out_stride);
  for (; c < x.count; ++c) tile<R, 1>(w, x.data + c * x.stride, x.stride, out + c * out_stride, out_stride);
}

// This thread's part of [0, rows).
template <typename Use>
void share_rows(int64_t rows, int threads, const Use &use) {
  constexpr int64_t block = 4 * tile_rows;
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = 0, team = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num();
    team = omp_get_num_threads();
#endif
    const int64_t blocks = (rows + block - 1) / block, last = blocks * (thread + 1) / team * block;
    use(blocks * thread / team * block, last < rows ? last : rows);
  }
}

}  // namespace

void multiply(const Matrix &matrix, int64_t first, int64_t rows, const Columns &x, float *out, int64_t out_stride) {
  with_rows(matrix, first, [&](const auto &w) {
    int64_t r = 0;
    for (; r + tile_rows <= rows; r += tile_rows) tiles<tile_rows>(w.from(r), x, out + r, out_stride);
    for (; r < rows; ++r) tiles<1>(w.from(r), x, out + r, out_stride);
  });
}

void product(const MatrixProduct &p) {
  share_rows(p.matrix.rows, p.threads, [&](int64_t first, int64_t last) {
    multiply(p.matrix, first, last - first, {p.x, p.count, p.matrix.size}, p.y + first, p.matrix.rows);
  });
}

void dequantise(const Dequantisation &p) {
  share_rows(p.matrix.rows, p.threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) read_matrix_row(p.matrix, r, p.y + r * p.matrix.size);
  });
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
