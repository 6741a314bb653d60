// What the files of the binding share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "kernels.hpp"

namespace nb = nanobind;

namespace mambakit {

using Tensor = nb::ndarray<nb::device::cpu>;
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using OptionalTensor = std::optional<Tensor>;
using OptionalInput = std::optional<Input>;

// The kernels of the instruction set in use.
const KernelTable &chosen_kernels();

Dtype dtype_of(const Input &tensor);

// Adds the class `Stack`.
void bind_stack(nb::module_ &m);

}  // namespace mambakit
