// One token through a stack of layers, in one parallel region: nothing but barriers stands between its operations.
//
// The threads divide the rows of every matrix, and channels or heads between the products. All arithmetic is in float.
// The order of every sum is fixed by the shapes, so results do not depend on the number of threads.
#include "step.hpp"

#include "matrix_rows.hpp"
#include "scratch.hpp"
#include "step_work.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

void advance_layer(const LayerStep &layer, const Work &work) {
  for (int64_t b = 0; b < work.batch; ++b) {
    const float *hidden = work.hidden + b * work.d_model;
    float *input = work.input + b * work.d_model;
    if (layer.norm.weight.data) normalise(hidden, work.d_model, layer.norm, 0, input);
    else std::memcpy(input, hidden, size_t(work.d_model) * sizeof(float));
  }
  switch (layer.kind) {
    case LayerKind::mamba: return advance(layer.mamba, layer.residual, work);
    case LayerKind::mamba2: return advance(layer.mamba2, layer.residual, work);
    case LayerKind::mamba3: return advance(layer.mamba3, layer.residual, work);
    case LayerKind::mlp: return advance(layer.mlp, layer.residual, work);
  }
}

WorkSizes sizes_of_layer(const LayerStep &layer, int64_t batch) {
  switch (layer.kind) {
    case LayerKind::mamba: return work_sizes(layer.mamba, batch);
    case LayerKind::mamba2: return work_sizes(layer.mamba2, batch);
    case LayerKind::mamba3: return work_sizes(layer.mamba3, batch);
    case LayerKind::mlp: return work_sizes(layer.mlp, batch);
  }
  return {};
}

void grow(int64_t &most, int64_t one) {
  if (most < one) most = one;
}

WorkSizes sizes_of_stack(const StackStep &p) {
  WorkSizes most{0, 0, 0, p.batch * p.d_model, p.batch * p.d_model};
  for (int64_t i = 0; i < p.count; ++i) {
    const WorkSizes one = sizes_of_layer(p.layers[i], p.batch);
    grow(most.projected, one.projected);
    grow(most.inner, one.inner);
    grow(most.shared, one.shared);
    grow(most.input, one.input);
    grow(most.own, one.own);
  }
  return most;
}

// `width` taps, or as many as there are where that is 0: knowing the width lets the compiler take the weights of a tap,
// which lie `width` apart, by shuffles.
template <int width>
void convolve_by(const Taps &taps, Range channels, int64_t batch, float *x, int64_t stride) {
  constexpr int V = lanes<float>;
  const int64_t W = width ? width : taps.width, kept = W - 1;
  for (int64_t c = channels.first; c < channels.last; c += V) {
    const int64_t left = channels.last - c, count = left < V ? left : V;
    float weights[V * (width ? width : 1)] = {};
    for (int64_t i = 0; i < count * width; i += V)
      store(weights + i, load_values(taps.weight, c * W + i, count * W - i));
    for (int64_t b = 0; b < batch; ++b) {
      float *state = taps.state + b * kept * taps.channels + c, *present = x + b * stride + c;
      Vec<float> sum = taps.bias.data ? load_values(taps.bias, c, left) : fill(0.0f);
      for (int64_t k = 0; k < W; ++k) {
        float weight[V] = {};
        if (width)
          for (int i = 0; i < V; ++i) weight[i] = weights[i * width + k];
        else
          for (int64_t i = 0; i < count; ++i) weight[i] = value(taps.weight, (c + i) * W + k);
        const Vec<float> input = load_some(k < kept ? state + k * taps.channels : present, left);
        sum = sum + load(weight) * input;
        if (k > 0) store_some(state + (k - 1) * taps.channels, input, left);
      }
      store_some(present, silu(sum), left);
    }
  }
}

}  // namespace

void step(const StackStep &p) {
  const WorkSizes sizes = sizes_of_stack(p);
  Scratch<float> projected(1, sizes.projected), inner(1, sizes.inner), shared(1, sizes.shared);
  Scratch<float> input(p.threads, sizes.input), own(p.threads, sizes.own);
  if (!p.input.data && !p.embedding.data) std::memcpy(p.y, p.x, size_t(p.batch * p.d_model) * sizeof(float));
#pragma omp parallel num_threads(p.threads)
  {
    Work work{p.batch,           p.d_model,     0,              1,           p.y,
              projected.part(0), inner.part(0), shared.part(0), input.mine(), own.mine()};
#ifdef _OPENMP
    work.thread = omp_get_thread_num();
    work.threads = omp_get_num_threads();  // perhaps fewer than were asked for
#endif
    if (p.embedding.data) {
      const Range rows = work.share(p.batch, 1);
      for (int64_t b = rows.first; b < rows.last; ++b)
        read_matrix_row(p.embedding, p.tokens[b], p.y + b * p.d_model);
      work.barrier();
    }
    if (p.input.data) {
      project(p.input, {p.source, p.batch, p.input.size}, work.share(p.d_model, row_block), p.y, p.d_model);
      work.barrier();
    }
    for (int64_t i = 0; i < p.count; ++i) advance_layer(p.layers[i], work);
    if (p.norm.weight.data) {
      const Range rows = work.share(p.batch, 1);
      for (int64_t b = rows.first; b < rows.last; ++b)
        normalise(p.y + b * p.d_model, p.d_model, p.norm, 0, p.y + b * p.d_model);
    }
    if (p.output.data) {
      work.barrier();
      const Range rows = work.share(p.output.rows, row_block);
      project(p.output, {p.y, p.batch, p.d_model}, rows, p.target, p.output.rows);
    }
  }
}

void convolve(const Taps &taps, Range channels, int64_t batch, float *x, int64_t stride) {
  if (taps.width == 4) convolve_by<4>(taps, channels, batch, x, stride);
  else convolve_by<0>(taps, channels, batch, x, stride);
}

void advance(const MlpStep &m, bool residual, const Work &work) {
  const int64_t rows = m.fc1.rows, dim = m.fc2.size;
  project(m.fc1, {work.input, work.batch, work.d_model}, work.share(rows, row_block), work.projected, rows);
  work.barrier();
  const Range channels = work.share(dim, row_block);
  for (int64_t b = 0; b < work.batch; ++b)
    for (int64_t c = channels.first; c < channels.last; c += lanes<float>) {
      const int64_t left = channels.last - c;
      const float *y = work.projected + b * rows + c, *gate = y + dim;
      store_some(work.inner + b * dim + c, load_some(y, left) * silu(load_some(gate, left)), left);
    }
  work.barrier();
  project_to_hidden(m.fc2, {work.inner, work.batch, dim}, residual, work);
}

WorkSizes work_sizes(const MlpStep &m, int64_t batch) { return {batch * m.fc1.rows, batch * m.fc2.size, 0, 0, 0}; }

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
