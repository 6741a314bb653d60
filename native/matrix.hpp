// A matrix (rows, size), row after row, in any of the ways that weights are stored in;
// src/mambakit/ops/quantised_linear.py says how the last two are.
#pragma once

#include <cstdint>

namespace mambakit {

enum class Encoding { float32, bfloat16, float16, int8, int4 };

struct Matrix {
  const void *data = nullptr;
  const void *scales = nullptr;  // float of each row for int8, bfloat16 of each `int4_group` columns for int4
  Encoding encoding = Encoding::float32;
  int64_t rows = 0, size = 0;
};

constexpr int64_t int4_group = 32;

// y (count, rows) = x (count, size) times the transpose of the matrix, all in float.
struct MatrixProduct {
  Matrix matrix;
  const float *x;
  float *y;
  int64_t count;
  int threads;
};

// y (rows, size) = the matrix in float.
struct Dequantisation {
  Matrix matrix;
  float *y;
  int threads;
};

}  // namespace mambakit
