// The kernels as the binding sees them: plain structs of pointers and strides, and one table for each instruction set.
#pragma once

#include <cstdint>

namespace mambakit {

enum class Dtype { float32, float64, bfloat16, float16 };

// A tensor (batch, length, [[rank,] groups,] channels) whose last axis is contiguous; strides count elements.
struct Rows {
  void *data = nullptr;
  int64_t batch_stride = 0, time_stride = 0, group_stride = 0, rank_stride = 0;
};

// Which rows belong to which sequence: the batch's, or with `bounds` (sequences + 1 offsets) those of a pack.
struct Sequences {
  int64_t batch, length, count;
  const int64_t *bounds;  // null for a batch

  int64_t entry(int64_t s) const { return bounds ? 0 : s; }
  int64_t start(int64_t s) const { return bounds ? bounds[s] : 0; }
  int64_t size(int64_t s) const { return bounds ? bounds[s + 1] - bounds[s] : length; }
  // Checkpoints of sequence s begin at this slot; slots(chunk) of them are enough for all.
  int64_t slot(int64_t s, int64_t chunk) const { return (bounds ? bounds[s] : s * length) / chunk + s; }
  int64_t slots(int64_t chunk) const { return batch * length / chunk + count; }
};

// Selective scan. Activations (u, delta, z, B, C, out and their gradients) are of `dtype`; everything else is float,
// or double where dtype is float64. States are (sequences, dim, state); checkpoints (slots, state, dim) hold the state
// before every `chunk`-th step. Null where absent.
struct ScanForward {
  Dtype dtype;
  Sequences sequences;
  int64_t dim, groups, state, chunk;
  bool softplus;
  Rows u, delta, z, B, C, out;
  const void *A, *D, *bias, *initial_state;
  void *final_state, *checkpoints;
  int threads;
};

struct ScanBackward {
  ScanForward forward;  // out is unused; checkpoints are read
  Rows grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C;
  const void *grad_final_state;
  void *grad_A, *grad_D, *grad_bias, *grad_initial_state;
};

// Causal depthwise convolution. x, y, states and their gradients are of `dtype`, weight (channels, width) and bias and
// their gradients float (double for float64). States are (sequences, width - 1, channels).
struct Convolution {
  Dtype dtype;
  Sequences sequences;
  int64_t channels, width;
  bool silu;
  Rows x, y;
  const void *weight, *bias, *initial_state;
  void *final_state;
  int threads;
};

struct ConvolutionBackward {
  Convolution forward;  // y and final_state are unused
  Rows grad_y, grad_x;
  const void *grad_final_state;
  void *grad_weight, *grad_bias, *grad_initial_state;
};

// The recurrence of Mamba-2 and Mamba-3. x, B, C, z and y are of `dtype`; everything else is float, or double where
// dtype is float64. B and C are (batch, length, rank, groups, state); y has an axis of ranks unless there is `down`.
// log_decay, scale, own and steps are (batch, length, heads), D (heads, headdim), up, gate and down
// (heads, rank, headdim), the biases (heads, rank, state), speeds (batch, length, heads or one, pairs), initial_angle
// (sequences, heads, pairs), the states (sequences or slots, heads, headdim, state). Null where absent: own is then
// scale, and up, gate and down are ones. With no pairs nothing is turned.
struct LinearRecurrence {
  Dtype dtype;
  Sequences sequences;
  int64_t rank, heads, headdim, groups, state, chunk;
  Rows x, B, C, z, y;
  const void *log_decay, *scale, *own, *D, *up, *gate, *down, *B_bias, *C_bias, *initial_state;
  int64_t pairs;
  bool interleaved;
  Rows speeds;
  const void *steps, *initial_angle;
  void *final_state, *kept;
  int threads;
};

// grad_y has the shape of y; grad_x and grad_z that of x; each other gradient that of its tensor.
struct LinearRecurrenceBackward {
  LinearRecurrence forward;  // y and final_state are unused; kept is read
  Rows grad_y, grad_x, grad_B, grad_C, grad_z, grad_speeds;
  const void *grad_final_state;
  void *grad_log_decay, *grad_scale, *grad_own, *grad_D, *grad_up, *grad_gate, *grad_down, *grad_B_bias, *grad_C_bias,
      *grad_initial_state, *grad_steps, *grad_initial_angle;
};

struct StackStep;       // step.hpp
struct MatrixProduct;   // matrix.hpp
struct Dequantisation;  // matrix.hpp

struct KernelTable {
  void (*scan_forward)(const ScanForward &);
  void (*scan_backward)(const ScanBackward &);
  void (*convolution)(const Convolution &);
  void (*convolution_backward)(const ConvolutionBackward &);
  void (*linear_recurrence)(const LinearRecurrence &);
  void (*linear_recurrence_backward)(const LinearRecurrenceBackward &);
  void (*step)(const StackStep &);
  void (*product)(const MatrixProduct &);
  void (*dequantise)(const Dequantisation &);
};

// The names of the instruction sets compiled in that this processor runs, best first, and the kernels of each.
int instruction_set_count();
const char *instruction_set_name(int index);
const KernelTable &kernels(int index);

}  // namespace mambakit
