// One token through a stack of layers, as the binding describes it: sizes, and pointers into tensors used in place.
#pragma once

#include "kernels.hpp"
#include "matrix.hpp"

namespace mambakit {

// Parameters are float32, bfloat16 or float16, each of its own dtype; data is null where a layer has none.
struct Parameter {
  const void *data = nullptr;
  Dtype dtype = Dtype::float32;
};

struct Linear : Matrix {
  Parameter bias;  // (rows)
};

struct Norm {
  Parameter weight;  // (dim); null where there is no norm
  float eps = 0;
};

struct Taps {
  Parameter weight, bias;  // (channels, width) and (channels)
  int64_t channels = 0, width = 0;
  float *state = nullptr;  // (batch, width - 1, channels)
};

struct MambaStep {
  int64_t dim, state, rank;
  Linear in_proj, x_proj, dt_proj, out_proj;
  Taps conv;
  Parameter A_log, D;  // (dim, state) and (dim)
  float *ssm;          // (batch, dim, state)
};

struct Mamba2Step {
  int64_t heads, headdim, groups, state;
  Linear in_proj, out_proj;
  Taps conv;
  Parameter A_log, D, dt_bias;  // (heads), but D of (heads, headdim) where D_has_headdim
  bool D_has_headdim, norm_before_gate;
  float dt_min, dt_max;
  Norm norm;   // (heads headdim), in `groups` groups
  float *ssm;  // (batch, heads, headdim, state)
};

struct Mamba3Step {
  int64_t heads, headdim, groups, state, rank, pairs;
  Linear in_proj, out_proj;
  Norm B_norm, C_norm, norm;         // (state), (state) and (heads headdim), the last in `heads` groups
  Parameter D, dt_bias;              // (heads)
  Parameter B_bias, C_bias;          // (heads, rank, state)
  Parameter mimo_x, mimo_z, mimo_o;  // (heads, rank, headdim); null at rank 1
  bool rational, interleaved;
  float A_floor;
  float *angle, *ssm;  // (batch, heads, pairs) and (batch, heads, headdim, state)
  float *k, *v;        // (batch, rank, heads, state) and (batch, heads, headdim)
};

struct MlpStep {
  Linear fc1, fc2;
};

enum class LayerKind { mamba, mamba2, mamba3, mlp };

// hidden = layer(norm(hidden)), added to hidden where there is a residual. Only the member of its kind is filled.
struct LayerStep {
  LayerKind kind;
  Norm norm;
  bool residual;
  MambaStep mamba;
  Mamba2Step mamba2;
  Mamba3Step mamba3;
  MlpStep mlp;
};

// y = norm(layers(x)), both (batch, d_model); every state is advanced in place. x is input(source) where there is an
// input, or rows of the embedding where there is one; target (batch, output.rows) becomes output(y) where there is one.
struct StackStep {
  int64_t batch, d_model;
  const LayerStep *layers;
  int64_t count;
  Norm norm;
  const float *x;
  float *y;
  int threads;
  Linear input, output;
  Matrix embedding;
  const float *source;
  const int64_t *tokens;  // (batch), rows of the embedding
  float *target;
};

}  // namespace mambakit
