// What the files of the binding share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "kernels.hpp"
#include "matrix.hpp"

namespace nb = nanobind;

namespace mambakit {

using Tensor = nb::ndarray<nb::device::cpu>;
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using OptionalTensor = std::optional<Tensor>;
using OptionalInput = std::optional<Input>;

// The kernels of the instruction set in use.
const KernelTable &chosen_kernels();

Dtype dtype_of(const Input &tensor);

// A matrix and the tensors that hold it.
class StoredMatrix {
 public:
  StoredMatrix(const Input &values, const OptionalInput &scales);

  const Matrix &view() const { return view_; }
  int64_t bytes() const { return int64_t(values_.nbytes() + (scales_ ? scales_->nbytes() : 0)); }

 private:
  Input values_;
  OptionalInput scales_;
  Matrix view_;
};

// Adds the class `Matrix` and its functions.
void bind_matrix(nb::module_ &m);

// Adds the class `Stack`.
void bind_stack(nb::module_ &m);

}  // namespace mambakit
