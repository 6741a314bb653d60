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

// What the forward and the backward of the recurrence are given, in the order of their struct.
LinearRecurrence recurrence_arguments(const Input &x, const Input &B, const Input &C, const OptionalInput &z,
                                      const Input &log_decay, const Input &scale, const OptionalInput &own,
                                      const OptionalInput &D, const OptionalInput &up, const OptionalInput &gate,
                                      const OptionalInput &down, const OptionalInput &B_bias,
                                      const OptionalInput &C_bias, const OptionalInput &speeds,
                                      const OptionalInput &steps, const OptionalInput &initial_angle,
                                      const OptionalInput &initial_state, bool interleaved,
                                      const std::vector<int64_t> &bounds, int64_t chunk, int threads) {
  LinearRecurrence p{};
  p.dtype = dtype_of(x);
  p.sequences = sequences(x, bounds);
  p.rank = int64_t(B.shape(2));
  p.heads = int64_t(x.shape(2));
  p.headdim = int64_t(x.shape(3));
  p.groups = int64_t(B.shape(3));
  p.state = int64_t(B.shape(4));
  p.chunk = chunk;
  p.x = rows(x);
  p.B = rows(B);
  p.C = rows(C);
  p.z = rows(z);
  p.log_decay = log_decay.data();
  p.scale = scale.data();
  p.own = data(own);
  p.D = data(D);
  p.up = data(up);
  p.gate = data(gate);
  p.down = data(down);
  p.B_bias = data(B_bias);
  p.C_bias = data(C_bias);
  p.pairs = speeds ? int64_t(speeds->shape(3)) : 0;
  p.interleaved = interleaved;
  p.speeds = rows(speeds);
  if (speeds && speeds->shape(2) == 1) p.speeds.group_stride = 0;  // all heads turn alike
  p.steps = data(steps);
  p.initial_angle = data(initial_angle);
  p.initial_state = data(initial_state);
  p.threads = useful_threads(threads, p.sequences.batch * p.sequences.length * p.heads * p.headdim * p.state);
  return p;
}

void linear_recurrence(const Input &x, const Input &B, const Input &C, const OptionalInput &z, const Input &log_decay,
                       const Input &scale, const OptionalInput &own, const OptionalInput &D, const OptionalInput &up,
                       const OptionalInput &gate, const OptionalInput &down, const OptionalInput &B_bias,
                       const OptionalInput &C_bias, const OptionalInput &speeds, const OptionalInput &steps,
                       const OptionalInput &initial_angle, const OptionalInput &initial_state, bool interleaved,
                       const std::vector<int64_t> &bounds, int64_t chunk, int threads, const Tensor &y,
                       const Tensor &final_state, const OptionalTensor &kept) {
  LinearRecurrence p =
      recurrence_arguments(x, B, C, z, log_decay, scale, own, D, up, gate, down, B_bias, C_bias, speeds, steps,
                           initial_angle, initial_state, interleaved, bounds, chunk, threads);
  p.y = rows(y);
  p.final_state = final_state.data();
  p.kept = data(kept);
  nb::gil_scoped_release release;
  chosen_kernels().linear_recurrence(p);
}

void linear_recurrence_backward(
    const Input &x, const Input &B, const Input &C, const OptionalInput &z, const Input &log_decay, const Input &scale,
    const OptionalInput &own, const OptionalInput &D, const OptionalInput &up, const OptionalInput &gate,
    const OptionalInput &down, const OptionalInput &B_bias, const OptionalInput &C_bias, const OptionalInput &speeds,
    const OptionalInput &steps, const OptionalInput &initial_angle, const OptionalInput &initial_state,
    bool interleaved, const std::vector<int64_t> &bounds, int64_t chunk, int threads, const Input &kept,
    const Input &grad_y, const Input &grad_final_state, const Tensor &grad_x, const Tensor &grad_B,
    const Tensor &grad_C, const OptionalTensor &grad_z, const Tensor &grad_log_decay, const Tensor &grad_scale,
    const OptionalTensor &grad_own, const OptionalTensor &grad_D, const OptionalTensor &grad_up,
    const OptionalTensor &grad_gate, const OptionalTensor &grad_down, const OptionalTensor &grad_B_bias,
    const OptionalTensor &grad_C_bias, const OptionalTensor &grad_speeds, const OptionalTensor &grad_steps,
    const OptionalTensor &grad_initial_angle, const OptionalTensor &grad_initial_state) {
  LinearRecurrenceBackward b{};
  b.forward = recurrence_arguments(x, B, C, z, log_decay, scale, own, D, up, gate, down, B_bias, C_bias, speeds, steps,
                                   initial_angle, initial_state, interleaved, bounds, chunk, threads);
  b.forward.kept = const_cast<void *>(kept.data());
  b.grad_y = rows(grad_y);
  b.grad_final_state = grad_final_state.data();
  b.grad_x = rows(grad_x);
  b.grad_B = rows(grad_B);
  b.grad_C = rows(grad_C);
  b.grad_z = rows(grad_z);
  b.grad_log_decay = grad_log_decay.data();
  b.grad_scale = grad_scale.data();
  b.grad_own = data(grad_own);
  b.grad_D = data(grad_D);
  b.grad_up = data(grad_up);
  b.grad_gate = data(grad_gate);
  b.grad_down = data(grad_down);
  b.grad_B_bias = data(grad_B_bias);
  b.grad_C_bias = data(grad_C_bias);
  b.grad_speeds = rows(grad_speeds);
  b.grad_steps = data(grad_steps);
  b.grad_initial_angle = data(grad_initial_angle);
  b.grad_initial_state = data(grad_initial_state);
  nb::gil_scoped_release release;
  chosen_kernels().linear_recurrence_backward(b);
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
  m.def("linear_recurrence", linear_recurrence, "x"_a, "B"_a, "C"_a, "z"_a.none(), "log_decay"_a, "scale"_a,
        "own"_a.none(), "D"_a.none(), "up"_a.none(), "gate"_a.none(), "down"_a.none(), "B_bias"_a.none(),
        "C_bias"_a.none(), "speeds"_a.none(), "steps"_a.none(), "initial_angle"_a.none(), "initial_state"_a.none(),
        "interleaved"_a, "bounds"_a, "chunk"_a, "threads"_a, "y"_a, "final_state"_a, "kept"_a.none());
  m.def("linear_recurrence_backward", linear_recurrence_backward, "x"_a, "B"_a, "C"_a, "z"_a.none(), "log_decay"_a,
        "scale"_a, "own"_a.none(), "D"_a.none(), "up"_a.none(), "gate"_a.none(), "down"_a.none(), "B_bias"_a.none(),
        "C_bias"_a.none(), "speeds"_a.none(), "steps"_a.none(), "initial_angle"_a.none(), "initial_state"_a.none(),
        "interleaved"_a, "bounds"_a, "chunk"_a, "threads"_a, "kept"_a, "grad_y"_a, "grad_final_state"_a, "grad_x"_a,
        "grad_B"_a, "grad_C"_a, "grad_z"_a.none(), "grad_log_decay"_a, "grad_scale"_a, "grad_own"_a.none(),
        "grad_D"_a.none(), "grad_up"_a.none(), "grad_gate"_a.none(), "grad_down"_a.none(), "grad_B_bias"_a.none(),
        "grad_C_bias"_a.none(), "grad_speeds"_a.none(), "grad_steps"_a.none(), "grad_initial_angle"_a.none(),
        "grad_initial_state"_a.none());
  bind_matrix(m);
  bind_stack(m);
}

}  // namespace mambakit
