// The class mambakit._native.Matrix, a matrix stored in any of the ways of matrix.hpp, and what is done with one alone.
#include "bindings.hpp"

using namespace nb::literals;

namespace mambakit {

StoredMatrix::StoredMatrix(const Input &values, const OptionalInput &scales) : values_(values), scales_(scales) {
  const nb::dlpack::dtype type = values.dtype();
  const bool in_bytes = type.bits == 8 && type.lanes == 1;
  if (in_bytes != scales.has_value()) throw std::invalid_argument("values in bytes, and no others, have scales");
  view_.data = values.data();
  view_.rows = int64_t(values.shape(0));
  view_.size = int64_t(values.shape(1));
  if (in_bytes) {
    const bool pairs = static_cast<nb::dlpack::dtype_code>(type.code) == nb::dlpack::dtype_code::UInt;
    view_.scales = scales->data();
    view_.encoding = pairs ? Encoding::int4 : Encoding::int8;
    if (pairs) view_.size *= 2;
    return;
  }
  switch (dtype_of(values)) {
    case Dtype::float32: view_.encoding = Encoding::float32; return;
    case Dtype::bfloat16: view_.encoding = Encoding::bfloat16; return;
    case Dtype::float16: view_.encoding = Encoding::float16; return;
    case Dtype::float64: throw std::invalid_argument("a matrix in float64 is not multiplied here");
  }
}

void bind_matrix(nb::module_ &m) {
  nb::class_<StoredMatrix>(m, "Matrix", "A matrix used in place: int8 values with a scale a row, uint8 with int4's.")
      .def(nb::init<const Input &, const OptionalInput &>(), "values"_a, "scales"_a.none() = nb::none())
      .def_prop_ro("rows", [](const StoredMatrix &matrix) { return matrix.view().rows; });
  m.def(
      "product",
      [](const StoredMatrix &matrix, const Input &x, const Tensor &y, int threads) {
        const MatrixProduct p{matrix.view(), static_cast<const float *>(x.data()), static_cast<float *>(y.data()),
                              int64_t(x.shape(0)), threads};
        nb::gil_scoped_release release;
        chosen_kernels().product(p);
      },
      "matrix"_a, "x"_a, "y"_a, "threads"_a, "y (count, rows) = x (count, columns) times the transpose of the matrix.");
  m.def(
      "dequantise",
      [](const StoredMatrix &matrix, const Tensor &y, int threads) {
        const Dequantisation p{matrix.view(), static_cast<float *>(y.data()), threads};
        nb::gil_scoped_release release;
        chosen_kernels().dequantise(p);
      },
      "matrix"_a, "y"_a, "threads"_a, "y (rows, columns) = the matrix in float32.");
}

}  // namespace mambakit
