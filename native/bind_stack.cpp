// The classes mambakit._native.Stack, layers that advance by one token in one call, and Ensemble, several such stacks
// that read the same token. src/mambakit/nn/native_stack.py fills them.
//
// It keeps a reference to every tensor, so that memory which is read in place can't be freed under it. Shapes, dtypes
// and contiguity are the caller's duty, as in bindings.cpp.
#include <chrono>
#include <vector>

#include "bindings.hpp"
#include "step.hpp"
#include "team.hpp"

using namespace nb::literals;

namespace mambakit {
namespace {

class Stack {
 public:
  Stack(const Tensor &x, const Tensor &y, const OptionalInput &norm, float eps) : x_(x), y_(y) {
    norm_ = make_norm(norm, eps);
  }

  void add_mamba(const OptionalInput &norm, float eps, bool residual, const StoredMatrix &in_proj,
                 const OptionalInput &in_bias, const Input &conv_weight, const OptionalInput &conv_bias,
                 const StoredMatrix &x_proj, const StoredMatrix &dt_proj, const Input &dt_bias, const Input &A_log, const Input &D,
                 const StoredMatrix &out_proj, const OptionalInput &out_bias, const Tensor &conv, const Tensor &ssm) {
    MambaStep &m = add(LayerKind::mamba, norm, eps, residual).mamba;
    m.dim = size(A_log, 0);
    m.state = size(A_log, 1);
    m.rank = dt_proj.view().size;
    m.in_proj = make_linear(in_proj, in_bias);
    m.x_proj = make_linear(x_proj, std::nullopt);
    m.dt_proj = make_linear(dt_proj, dt_bias);
    m.out_proj = make_linear(out_proj, out_bias);
    m.conv = make_taps(conv_weight, conv_bias, conv);
    m.A_log = parameter(A_log);
    m.D = parameter(D);
    m.ssm = state(ssm);
  }

  void add_mamba2(const OptionalInput &norm, float eps, bool residual, const StoredMatrix &in_proj,
                  const OptionalInput &in_bias, const Input &conv_weight, const OptionalInput &conv_bias,
                  const Input &A_log, const Input &D, const Input &dt_bias, float dt_min, float dt_max, int64_t groups,
                  const OptionalInput &gated_norm, float gated_eps, bool norm_before_gate, const StoredMatrix &out_proj,
                  const OptionalInput &out_bias, const Tensor &conv, const Tensor &ssm) {
    Mamba2Step &m = add(LayerKind::mamba2, norm, eps, residual).mamba2;
    m.heads = size(ssm, 1);
    m.headdim = size(ssm, 2);
    m.groups = groups;
    m.state = size(ssm, 3);
    m.in_proj = make_linear(in_proj, in_bias);
    m.out_proj = make_linear(out_proj, out_bias);
    m.conv = make_taps(conv_weight, conv_bias, conv);
    m.A_log = parameter(A_log);
    m.D = parameter(D);
    m.dt_bias = parameter(dt_bias);
    m.D_has_headdim = size(D, 0) != m.heads;
    m.norm_before_gate = norm_before_gate;
    m.dt_min = dt_min;
    m.dt_max = dt_max;
    m.norm = make_norm(gated_norm, gated_eps);
    m.ssm = state(ssm);
  }

  void add_mamba3(const OptionalInput &norm, float eps, bool residual, const StoredMatrix &in_proj, const Input &B_norm,
                  float B_eps, const Input &C_norm, float C_eps, const Input &D, const Input &dt_bias,
                  const Input &B_bias, const Input &C_bias, const OptionalInput &mimo_x, const OptionalInput &mimo_z,
                  const OptionalInput &mimo_o, int64_t groups, bool rational, float A_floor,
                  const OptionalInput &gated_norm, float gated_eps, const StoredMatrix &out_proj, const Tensor &angle,
                  const Tensor &ssm, const Tensor &k, const Tensor &v) {
    Mamba3Step &m = add(LayerKind::mamba3, norm, eps, residual).mamba3;
    m.heads = size(ssm, 1);
    m.headdim = size(ssm, 2);
    m.groups = groups;
    m.state = size(ssm, 3);
    m.rank = size(k, 1);
    m.pairs = size(angle, 2);
    m.in_proj = make_linear(in_proj, std::nullopt);
    m.out_proj = make_linear(out_proj, std::nullopt);
    m.B_norm = make_norm(B_norm, B_eps);
    m.C_norm = make_norm(C_norm, C_eps);
    m.norm = make_norm(gated_norm, gated_eps);
    m.D = parameter(D);
    m.dt_bias = parameter(dt_bias);
    m.B_bias = parameter(B_bias);
    m.C_bias = parameter(C_bias);
    m.mimo_x = parameter(mimo_x);
    m.mimo_z = parameter(mimo_z);
    m.mimo_o = parameter(mimo_o);
    m.rational = rational;
    m.interleaved = m.rank == 1;
    m.A_floor = A_floor;
    m.angle = state(angle);
    m.ssm = state(ssm);
    m.k = state(k);
    m.v = state(v);
  }

  void add_mlp(const OptionalInput &norm, float eps, bool residual, const StoredMatrix &fc1, const StoredMatrix &fc2) {
    MlpStep &m = add(LayerKind::mlp, norm, eps, residual).mlp;
    m.fc1 = make_linear(fc1, std::nullopt);
    m.fc2 = make_linear(fc2, std::nullopt);
  }

  void set_input(const StoredMatrix &weight, const OptionalInput &bias, const Tensor &source) {
    input_ = make_linear(weight, bias);
    source_ = state(source);
  }

  void set_embedding(const StoredMatrix &table, const Tensor &tokens) {
    kept_matrices_.push_back(table);
    kept_states_.push_back(tokens);
    embedding_ = table.view();
    tokens_ = static_cast<const int64_t *>(tokens.data());
  }

  void set_output(const StoredMatrix &weight, const OptionalInput &bias, const Tensor &target) {
    output_ = make_linear(weight, bias);
    target_ = state(target);
  }

  const float *target() const { return target_; }

  void step(int at_most) {
    const int threads = team_.size(weight_bytes_, at_most);
    const auto start = std::chrono::steady_clock::now();
    step_with(threads);
    team_.took(std::chrono::steady_clock::now() - start, threads);
  }

  void step_with(int threads) const {
    const StackStep p{size(x_, 0),
                      size(x_, 1),
                      layers_.data(),
                      int64_t(layers_.size()),
                      norm_,
                      static_cast<const float *>(x_.data()),
                      static_cast<float *>(y_.data()),
                      threads,
                      input_,
                      output_,
                      embedding_,
                      source_,
                      tokens_,
                      target_};
    nb::gil_scoped_release release;
    chosen_kernels().step(p);
  }

 private:
  template <typename Array>
  static int64_t size(const Array &tensor, size_t axis) {
    return int64_t(tensor.shape(axis));
  }

  LayerStep &add(LayerKind kind, const OptionalInput &norm, float eps, bool residual) {
    layers_.emplace_back();
    LayerStep &layer = layers_.back();
    layer.kind = kind;
    layer.norm = make_norm(norm, eps);
    layer.residual = residual;
    return layer;
  }

  Parameter parameter(const OptionalInput &tensor) {
    if (!tensor) return {};
    kept_inputs_.push_back(*tensor);
    weight_bytes_ += int64_t(tensor->nbytes());
    return {tensor->data(), dtype_of(*tensor)};
  }
  Linear make_linear(const StoredMatrix &weight, const OptionalInput &bias) {
    kept_matrices_.push_back(weight);
    weight_bytes_ += weight.bytes();
    return {weight.view(), parameter(bias)};
  }
  Norm make_norm(const OptionalInput &weight, float eps) { return {parameter(weight), eps}; }
  Taps make_taps(const Input &weight, const OptionalInput &bias, const Tensor &conv) {
    return {parameter(weight), parameter(bias), size(weight, 0), size(weight, weight.ndim() - 1), state(conv)};
  }
  float *state(const Tensor &tensor) {
    kept_states_.push_back(tensor);
    return static_cast<float *>(tensor.data());
  }

  Tensor x_, y_;
  int64_t weight_bytes_ = 0;
  Team team_;
  Norm norm_;
  Linear input_, output_;
  Matrix embedding_;
  float *source_ = nullptr, *target_ = nullptr;
  const int64_t *tokens_ = nullptr;
  std::vector<LayerStep> layers_;
  std::vector<Input> kept_inputs_;
  std::vector<StoredMatrix> kept_matrices_;
  std::vector<Tensor> kept_states_;
};

// Stacks with projections, of the same source; y is the mean of their targets.
class Ensemble {
 public:
  Ensemble(const nb::list &stacks, const Tensor &y) : kept_(stacks), y_(y) {
    for (nb::handle stack : stacks) stacks_.push_back(nb::cast<Stack *>(stack));
  }

  void step(int at_most) {
    for (Stack *stack : stacks_) stack->step(at_most);
    float *y = static_cast<float *>(y_.data());
    for (size_t i = 0; i < y_.size(); ++i) {
      float sum = 0;
      for (const Stack *stack : stacks_) sum += stack->target()[i];
      y[i] = sum / float(stacks_.size());
    }
  }

 private:
  nb::list kept_;
  std::vector<Stack *> stacks_;
  Tensor y_;
};

}  // namespace

void bind_stack(nb::module_ &m) {
  nb::class_<Stack>(m, "Stack", "Layers that advance by one token in one call; tensors are used in place.")
      .def(nb::init<const Tensor &, const Tensor &, const OptionalInput &, float>(), "x"_a, "y"_a, "norm"_a.none(),
           "eps"_a)
      .def("add_mamba", &Stack::add_mamba, "norm"_a.none(), "eps"_a, "residual"_a, "in_proj"_a, "in_bias"_a.none(),
           "conv_weight"_a, "conv_bias"_a.none(), "x_proj"_a, "dt_proj"_a, "dt_bias"_a, "A_log"_a, "D"_a, "out_proj"_a,
           "out_bias"_a.none(), "conv"_a, "ssm"_a)
      .def("add_mamba2", &Stack::add_mamba2, "norm"_a.none(), "eps"_a, "residual"_a, "in_proj"_a, "in_bias"_a.none(),
           "conv_weight"_a, "conv_bias"_a.none(), "A_log"_a, "D"_a, "dt_bias"_a, "dt_min"_a, "dt_max"_a, "groups"_a,
           "gated_norm"_a.none(), "gated_eps"_a, "norm_before_gate"_a, "out_proj"_a, "out_bias"_a.none(), "conv"_a,
           "ssm"_a)
      .def("add_mamba3", &Stack::add_mamba3, "norm"_a.none(), "eps"_a, "residual"_a, "in_proj"_a, "B_norm"_a,
           "B_eps"_a, "C_norm"_a, "C_eps"_a, "D"_a, "dt_bias"_a, "B_bias"_a, "C_bias"_a, "mimo_x"_a.none(),
           "mimo_z"_a.none(), "mimo_o"_a.none(), "groups"_a, "rational"_a, "A_floor"_a, "gated_norm"_a.none(),
           "gated_eps"_a, "out_proj"_a, "angle"_a, "ssm"_a, "k"_a, "v"_a)
      .def("add_mlp", &Stack::add_mlp, "norm"_a.none(), "eps"_a, "residual"_a, "fc1"_a, "fc2"_a)
      .def("set_input", &Stack::set_input, "weight"_a, "bias"_a.none(), "source"_a, "x = weight source + bias from now on.")
      .def("set_embedding", &Stack::set_embedding, "table"_a, "tokens"_a, "x = rows of the table from now on.")
      .def("set_output", &Stack::set_output, "weight"_a, "bias"_a.none(), "target"_a, "A step sets target = weight y + bias.")
      .def("step", &Stack::step, "at_most"_a, "y = norm(layers(x)); the states advance. By so many threads as help.")
      .def("step_with", &Stack::step_with, "threads"_a, "As `step`, by so many threads.");
  nb::class_<Ensemble>(m, "Ensemble", "Stacks with projections that advance by the same token in one call.")
      .def(nb::init<const nb::list &, const Tensor &>(), "stacks"_a, "y"_a)
      .def("step", &Ensemble::step, "at_most"_a, "y = the mean of the targets; the states advance.");
}

}  // namespace mambakit
