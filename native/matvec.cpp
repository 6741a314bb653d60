// Products of a matrix with a few vectors. Tiles of rows and vectors keep their sums in registers; the rows of a tile
// come from memory with the first vectors and from the first-level cache with the others.
#include "matvec.hpp"

#include "parts.hpp"

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

// Sums of a tile of R rows and C vectors. A small tile has each sum in two halves, to hide the latency of the adding.
template <typename T, int R, int C>
MAMBAKIT_INLINE void tile(const T *w, int64_t size, const float *x, int64_t x_stride, float *out, int64_t out_stride) {
  constexpr int V = lanes<float>, H = R * C > tile_rows ? 1 : 2;
  Vec<float> sums[H][R][C];
  for (int h = 0; h < H; ++h)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[h][r][c] = fill(0.0f);
  int64_t i = 0;
  for (; i + H * V <= size; i += H * V)
    for (int h = 0; h < H; ++h) {
      Vec<float> rows[R];
      for (int r = 0; r < R; ++r) {
        rows[r] = load_wide(w + r * size + i + h * V);
        prefetch(w + (r + R) * size + i + h * V);  // of the next tile: the processor does not foresee where rows begin
      }
      for (int c = 0; c < C; ++c) {
        const Vec<float> column = load(x + c * x_stride + i + h * V);
        for (int r = 0; r < R; ++r) sums[h][r][c] = sums[h][r][c] + rows[r] * column;
      }
    }
  for (; i < size; i += V)
    for (int c = 0; c < C; ++c) {
      const Vec<float> column = load_some(x + c * x_stride + i, size - i);
      for (int r = 0; r < R; ++r) sums[0][r][c] = sums[0][r][c] + load_some(w + r * size + i, size - i) * column;
    }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      Vec<float> total = sums[0][r][c];
      for (int h = 1; h < H; ++h) total = total + sums[h][r][c];
      out[c * out_stride + r] = sum_of_lanes<float>(total);
    }
}

template <typename T, int R>
MAMBAKIT_INLINE void tiles(const T *w, int64_t size, const Columns &x, float *out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + tile_columns <= x.count; c += tile_columns)
    tile<T, R, tile_columns>(w, size, x.data + c * x.stride, x.stride, out + c * out_stride, out_stride);
  for (; c < x.count; ++c) tile<T, R, 1>(w, size, x.data + c * x.stride, x.stride, out + c * out_stride, out_stride);
}

template <typename T>
void multiply(const T *w, int64_t size, int64_t rows, const Columns &x, float *out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) tiles<T, tile_rows>(w + r * size, size, x, out + r, out_stride);
  for (; r < rows; ++r) tiles<T, 1>(w + r * size, size, x, out + r, out_stride);
}

}  // namespace

void multiply(const void *weight, Dtype dtype, int64_t size, int64_t first, int64_t rows, const Columns &x, float *out,
              int64_t out_stride) {
  const int64_t skip = first * size;
  switch (dtype) {
    case Dtype::float32:
      return multiply(static_cast<const float *>(weight) + skip, size, rows, x, out, out_stride);
    case Dtype::bfloat16:
      return multiply(static_cast<const bfloat16 *>(weight) + skip, size, rows, x, out, out_stride);
    case Dtype::float16:
      return multiply(static_cast<const float16 *>(weight) + skip, size, rows, x, out, out_stride);
    case Dtype::float64: return;  // such models step through their layers
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
