// The extension module mambakit._native: checks nothing that Python has checked, copies no tensor.
//
// Tensors come as DLPack views. Shapes, dtypes and the contiguity of the last axis are the caller's duty
// (src/mambakit/ops/cpu); what is read here are pointers and strides.
#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

using namespace nb::literals;

namespace mambakit {

namespace {
int chosen = 0;

// Waking a thread costs as much as some ten microseconds of work; `work` counts updates of a state or a tap.
int useful_threads(int threads, int64_t work) {
  constexpr int64_t worth_a_thread = 100000;
  const int64_t useful = 1 + work / worth_a_thread;
  return useful < threads ? int(useful) : threads;
}
}  // namespace

const KernelTable &chosen_kernels() { return kernels(chosen); }

Dtype dtype_of(const Input &tensor) {
  const nb::dlpack::dtype type = tensor.dtype();
  const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
  if (code == nb::dlpack::dtype_code::Float && type.bits == 32) return Dtype::float32;
  if (code == nb::dlpack::dtype_code::Float && type.bits == 64) return Dtype::float64;
  if (code == nb::dlpack::dtype_code::Float && type.bits == 16) return Dtype::float16;
  if (code == nb::dlpack::dtype_code::Bfloat && type.bits == 16) return Dtype::bfloat16;
  throw std::invalid_argument("a tensor is not of a supported floating dtype");
}

namespace {

template <typename Array>
Rows rows(const Array &tensor) {
  const size_t axes = tensor.ndim();
  return {const_cast<void *>(static_cast<const void *>(tensor.data())), tensor.stride(0), tensor.stride(1),
          axes > 3 ? tensor.stride(axes - 2) : 0, axes > 4 ? tensor.stride(2) : 0};
}
template <typename Array>
Rows rows(const std::optional<Array> &tensor) {
  return tensor ? rows(*tensor) : Rows{};
}

const void *data(const OptionalInput &tensor) { return tensor ? static_cast<const void *>(tensor->data()) : nullptr; }
void *data(const OptionalTensor &tensor) { return tensor ? static_cast<void *>(tensor->data()) : nullptr; }

// `bounds` is empty for a batch, else holds the cumulative lengths of a pack.
Sequences sequences(const Input &like, const std::vector<int64_t> &bounds) {
  const int64_t batch = int64_t(like.shape(0)), length = int64_t(like.shape(1));
  return {batch, length, bounds.empty() ? batch : int64_t(bounds.size()) - 1, bounds.empty() ? nullptr : bounds.data()};
}

ScanForward scan_arguments(const Input &u, const Input &delta, const Input &A, const Input &B, const Input &C,
                           const OptionalInput &D, const OptionalInput &z, const OptionalInput &bias,
                           const OptionalInput &initial_state, const std::vector<int64_t> &bounds, bool softplus,
                           int64_t chunk, int threads) {
  ScanForward p{};
  p.dtype = dtype_of(u);
  p.sequences = sequences(u, bounds);
  p.dim = int64_t(u.shape(2));
  p.groups = int64_t(B.shape(2));
  p.state = int64_t(B.shape(3));
  p.chunk = chunk;
  p.softplus = softplus;
  p.u = rows(u);
  p.delta = rows(delta);
  p.z = rows(z);
  p.B = rows(B);
  p.C = rows(C);
  p.A = A.data();
  p.D = data(D);
  p.bias = data(bias);
  p.initial_state = data(initial_state);
  p.threads = useful_threads(threads, p.sequences.batch * p.sequences.length * p.dim * p.state);
  return p;
}

void scan_forward(const Input &u, const Input &delta, const Input &A, const Input &B, const Input &C,
                  const OptionalInput &D, const OptionalInput &z, const OptionalInput &bias,
                  const OptionalInput &initial_state, const std::vector<int64_t> &bounds, bool softplus, int64_t chunk,
                  int threads, const Tensor &out, const Tensor &final_state, const OptionalTensor &checkpoints) {
  ScanForward p = scan_arguments(u, delta, A, B, C, D, z, bias, initial_state, bounds, softplus, chunk, threads);
  p.out = rows(out);
  p.final_state = final_state.data();
  p.checkpoints = data(checkpoints);
  nb::gil_scoped_release release;
  chosen_kernels().scan_forward(p);
}

void scan_backward(const Input &u, const Input &delta, const Input &A, const Input &B, const Input &C,
                   const OptionalInput &D, const OptionalInput &z, const OptionalInput &bias,
                   const std::vector<int64_t> &bounds, bool softplus, int64_t chunk, int threads,
                   const Input &checkpoints, const Input &grad_out, const Input &grad_final_state, const Tensor &grad_u,
                   const Tensor &grad_delta, const Tensor &grad_A, const Tensor &grad_B, const Tensor &grad_C,
                   const OptionalTensor &grad_D, const OptionalTensor &grad_z, const OptionalTensor &grad_bias,
                   const OptionalTensor &grad_initial_state) {
  ScanBackward q{};
  q.forward = scan_arguments(u, delta, A, B, C, D, z, bias, std::nullopt, bounds, softplus, chunk, threads);
  q.forward.checkpoints = const_cast<void *>(checkpoints.data());
  q.grad_out = rows(grad_out);
  q.grad_final_state = grad_final_state.data();
  q.grad_u = rows(grad_u);
  q.grad_delta = rows(grad_delta);
  q.grad_B = rows(grad_B);
  q.grad_C = rows(grad_C);
  q.grad_z = rows(grad_z);
  q.grad_A = grad_A.data();
  q.grad_D = data(grad_D);
  q.grad_bias = data(grad_bias);
  q.grad_initial_state = data(grad_initial_state);
  nb::gil_scoped_release release;
  chosen_kernels().scan_backward(q);
}

Convolution convolution_arguments(const Input &x, const Input &weight, const OptionalInput &bias,
                                  const OptionalInput &initial_state, const std::vector<int64_t> &bounds, bool silu,
                                  int threads) {
  Convolution p{};
  p.dtype = dtype_of(x);
  p.sequences = sequences(x, bounds);
  p.channels = int64_t(weight.shape(0));
  p.width = int64_t(weight.shape(1));
  p.silu = silu;
  p.x = rows(x);
  p.weight = weight.data();
  p.bias = data(bias);
  p.initial_state = data(initial_state);
  p.threads = useful_threads(threads, p.sequences.batch * p.sequences.length * p.channels * p.width);
  return p;
}

void convolution(const Input &x, const Input &weight, const OptionalInput &bias, const OptionalInput &initial_state,
                 const std::vector<int64_t> &bounds, bool silu, int threads, const Tensor &y,
                 const Tensor &final_state) {
  Convolution p = convolution_arguments(x, weight, bias, initial_state, bounds, silu, threads);
  p.y = rows(y);
  p.final_state = final_state.data();
  nb::gil_scoped_release release;
  chosen_kernels().convolution(p);
}

void convolution_backward(const Input &x, const Input &weight, const OptionalInput &bias,
                          const OptionalInput &initial_state, const std::vector<int64_t> &bounds, bool silu,
                          int threads, const Input &grad_y, const Input &grad_final_state, const Tensor &grad_x,
                          const Tensor &grad_weight, const OptionalTensor &grad_bias,
                          const OptionalTensor &grad_initial_state) {
  ConvolutionBackward q{};
  q.forward = convolution_arguments(x, weight, bias, initial_state, bounds, silu, threads);
  q.grad_y = rows(grad_y);
  q.grad_final_state = grad_final_state.data();
  q.grad_x = rows(grad_x);
  q.grad_weight = grad_weight.data();
  q.grad_bias = data(grad_bias);
  q.grad_initial_state = data(grad_initial_state);
  nb::gil_scoped_release release;
  chosen_kernels().convolution_backward(q);
}

void linear_recurrence(const Input &v, const Input &k, const Input &q, const Input &log_decay, const Input &scale,
                       const OptionalInput &own, const OptionalInput &D, const OptionalInput &z,
                       const OptionalInput &initial_state, const std::vector<int64_t> &bounds, int64_t chunk,
                       int threads, const Tensor &y, const Tensor &final_state, const OptionalTensor &kept) {
  LinearRecurrence p{};
  p.dtype = dtype_of(v);
  p.sequences = sequences(v, bounds);
  p.rank = int64_t(v.shape(2));
  p.heads = int64_t(v.shape(3));
  p.headdim = int64_t(v.shape(4));
  p.groups = int64_t(k.shape(3));
  p.state = int64_t(k.shape(4));
  p.chunk = chunk;
  p.v = rows(v);
  p.k = rows(k);
  p.q = rows(q);
  p.z = rows(z);
  p.y = rows(y);
  p.log_decay = log_decay.data();
  p.scale = scale.data();
  p.own = data(own);
  p.D = data(D);
  p.initial_state = data(initial_state);
  p.final_state = final_state.data();
  p.kept = data(kept);
  p.threads = useful_threads(threads, p.sequences.batch * p.sequences.length * p.heads * p.headdim * p.state);
  nb::gil_scoped_release release;
  chosen_kernels().linear_recurrence(p);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < instruction_set_count(); ++i) names.emplace_back(instruction_set_name(i));
  return names;
}

void use_instruction_set(const std::string &name) {
  for (int i = 0; i < instruction_set_count(); ++i)
    if (name == instruction_set_name(i)) {
      chosen = i;
      return;
    }
  throw std::invalid_argument("instruction set '" + name + "' was not compiled in or does not run on this processor");
}

std::string instruction_set() { return instruction_set_name(chosen); }

}  // namespace

NB_MODULE(_native, m) {
  if (instruction_set_count() == 0) throw nb::import_error("this processor is older than x86-64-v2");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("instruction_sets", instruction_sets, "Instruction sets compiled in that this processor runs, best first.");
  m.def("instruction_set", instruction_set, "The instruction set in use.");
  m.def("use_instruction_set", use_instruction_set, "name"_a, "Use another of `instruction_sets()`.");
  m.def("scan_forward", scan_forward, "u"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(),
        "bias"_a.none(), "initial_state"_a.none(), "bounds"_a, "softplus"_a, "chunk"_a, "threads"_a, "out"_a,
        "final_state"_a, "checkpoints"_a.none());
  m.def("scan_backward", scan_backward, "u"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(),
        "bias"_a.none(), "bounds"_a, "softplus"_a, "chunk"_a, "threads"_a, "checkpoints"_a, "grad_out"_a,
        "grad_final_state"_a, "grad_u"_a, "grad_delta"_a, "grad_A"_a, "grad_B"_a, "grad_C"_a, "grad_D"_a.none(),
        "grad_z"_a.none(), "grad_bias"_a.none(), "grad_initial_state"_a.none());
  m.def("convolution", convolution, "x"_a, "weight"_a, "bias"_a.none(), "initial_state"_a.none(), "bounds"_a, "silu"_a,
        "threads"_a, "y"_a, "final_state"_a);
  m.def("convolution_backward", convolution_backward, "x"_a, "weight"_a, "bias"_a.none(), "initial_state"_a.none(),
        "bounds"_a, "silu"_a, "threads"_a, "grad_y"_a, "grad_final_state"_a, "grad_x"_a, "grad_weight"_a,
        "grad_bias"_a.none(), "grad_initial_state"_a.none());
  m.def("linear_recurrence", linear_recurrence, "v"_a, "k"_a, "q"_a, "log_decay"_a, "scale"_a, "own"_a.none(),
        "D"_a.none(), "z"_a.none(), "initial_state"_a.none(), "bounds"_a, "chunk"_a, "threads"_a, "y"_a,
        "final_state"_a, "kept"_a.none());
  bind_stack(m);
}

}  // namespace mambakit
