// What the layers of a step share: the team of threads, its working memory, and operations on rows of float.
#pragma once

#include "matvec.hpp"
#include "parts.hpp"
#include "step.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
  // The part that lies in [from, to), which may be empty.
  Range within(int64_t from, int64_t to) const {
    const int64_t a = first > from ? first : from, b = last < to ? last : to;
    return {a, a < b ? b : a};
  }
};

// Floats of working memory: `projected`, `inner` and `shared` serve the team, `input` and `own` each thread.
struct WorkSizes {
  int64_t projected, inner, shared, input, own;
};

// One thread's view of a step. Between two barriers, threads write different parts of the team's memory.
struct Work {
  int64_t batch, d_model;
  int thread, threads;
  float *hidden;            // (batch, d_model), the team's: what the layers add to
  float *projected, *inner, *shared;
  float *input, *own;

  void barrier() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }

  // This thread's part of [0, count), in whole blocks but for the last.
  Range share(int64_t count, int64_t block) const {
    const int64_t blocks = (count + block - 1) / block;
    const int64_t first = blocks * thread / threads * block, last = blocks * (thread + 1) / threads * block;
    return {first < count ? first : count, last < count ? last : count};
  }
};

constexpr int64_t row_block = 16;  // rows of a matrix, which threads divide among themselves by this many

MAMBAKIT_INLINE Vec<float> load_values(const Parameter &p, int64_t at, int64_t left) {
  if (p.dtype == Dtype::bfloat16) return load_some(static_cast<const bfloat16 *>(p.data) + at, left);
  if (p.dtype == Dtype::float16) return load_some(static_cast<const float16 *>(p.data) + at, left);
  return load_some(static_cast<const float *>(p.data) + at, left);
}

MAMBAKIT_INLINE float value(const Parameter &p, int64_t at) {
  if (p.dtype == Dtype::bfloat16) return widen(static_cast<const bfloat16 *>(p.data)[at]);
  if (p.dtype == Dtype::float16) return widen(static_cast<const float16 *>(p.data)[at]);
  return static_cast<const float *>(p.data)[at];
}

MAMBAKIT_INLINE Vec<float> silu(Vec<float> x) { return x * sigmoid<float>(x); }
MAMBAKIT_INLINE float scalar_softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
MAMBAKIT_INLINE float scalar_sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// 1 / sqrt(mean(x^2) + eps).
MAMBAKIT_INLINE float inverse_rms(const float *x, int64_t size, float eps) {
  Vec<float> squares = fill(0.0f);
  for (int64_t i = 0; i < size; i += lanes<float>) {
    const Vec<float> values = load_some(x + i, size - i);
    squares = squares + values * values;
  }
  return 1.0f / std::sqrt(sum_of_lanes<float>(squares) / float(size) + eps);
}

// y = x / rms(x) times the `size` weights from the `first` on; y may be x.
MAMBAKIT_INLINE void normalise(const float *x, int64_t size, const Norm &norm, int64_t first, float *y) {
  const Vec<float> scale = fill(inverse_rms(x, size, norm.eps));
  for (int64_t i = 0; i < size; i += lanes<float>)
    store_some(y + i, load_some(x + i, size - i) * scale * load_values(norm.weight, first + i, size - i), size - i);
}

// Rows of `linear` times x, into out[b * stride + row].
MAMBAKIT_INLINE void project(const Linear &linear, const Columns &x, Range rows, float *out, int64_t stride) {
  if (rows.size() == 0) return;
  multiply(linear, rows.first, rows.size(), x, out + rows.first, stride);
  if (!linear.bias.data) return;
  for (int64_t b = 0; b < x.count; ++b)
    for (int64_t r = rows.first; r < rows.last; r += lanes<float>) {
      float *to = out + b * stride + r;
      const int64_t left = rows.last - r;
      store_some(to, load_some(to, left) + load_values(linear.bias, r, left), left);
    }
}

// A layer's last product: to `hidden`, or added to it.
MAMBAKIT_INLINE void project_to_hidden(const Linear &linear, const Columns &x, bool residual, const Work &work) {
  const Range rows = work.share(work.d_model, row_block);
  project(linear, x, rows, work.own, work.d_model);
  for (int64_t b = 0; b < work.batch; ++b)
    for (int64_t r = rows.first; r < rows.last; ++r) {
      float &to = work.hidden[b * work.d_model + r];
      to = work.own[b * work.d_model + r] + (residual ? to : 0.0f);
    }
  work.barrier();
}

// x = silu(convolution of the state and x), for some channels of x[b * stride + channel]; the state moves on.
void convolve(const Taps &taps, Range channels, int64_t batch, float *x, int64_t stride);

void advance(const MambaStep &layer, bool residual, const Work &work);
void advance(const Mamba2Step &layer, bool residual, const Work &work);
void advance(const Mamba3Step &layer, bool residual, const Work &work);
void advance(const MlpStep &layer, bool residual, const Work &work);

WorkSizes work_sizes(const MambaStep &layer, int64_t batch);
WorkSizes work_sizes(const Mamba2Step &layer, int64_t batch);
WorkSizes work_sizes(const Mamba3Step &layer, int64_t batch);
WorkSizes work_sizes(const MlpStep &layer, int64_t batch);

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
