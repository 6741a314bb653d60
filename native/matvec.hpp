// Products of a matrix with a few vectors: what one step of a layer spends its time on.
#pragma once

#include "matrix.hpp"
#include "vector.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// Vectors (count, size) in float, `stride` apart.
struct Columns {
  const float *data;
  int64_t count, stride;
};

// out[b * out_stride + r] = matrix[first + r] . x_b for the rows [first, first + rows). Each row is read from memory
// once, whatever the number of vectors.
void multiply(const Matrix &matrix, int64_t first, int64_t rows, const Columns &x, float *out, int64_t out_stride);

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
