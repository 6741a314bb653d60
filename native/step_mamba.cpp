// One token through a Mamba-1 mixer: src/mambakit/nn/mamba.py is the definition.
#include "step_work.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

// Advances the states (count, N) of some channels and gives what C reads of each; `whole`: N is whole vectors.
template <bool whole>
MAMBAKIT_INLINE Vec<float> advance_channels(float *h, const float *A2, const float *B, const float *C,
                                            const float *exponent, const float *input, int64_t count, int64_t N) {
  constexpr int V = lanes<float>;
  Vec<float> sums[V];
  for (int64_t c = 0; c < V; ++c) {
    Vec<float> sum = fill(0.0f);
    for (int64_t n = 0; n < (c < count ? N : 0); n += V) {
      const int64_t left = whole ? V : N - n;
      float *state = h + c * N + n;
      const Vec<float> decay = exp2(fill(exponent[c]) * load_some(A2 + c * N + n, left));
      const Vec<float> next = decay * load_some(state, left) + fill(input[c]) * load_some(B + n, left);
      store_some(state, next, left);
      sum = sum + next * load_some(C + n, left);
    }
    sums[c] = sum;
  }
  return sums_of_rows(sums);
}

// One step of the scan for some channels. x is in the first half of `projected`, z in the second; dt, before its
// softplus, is in `inner`, which takes y; B and C are in `shared` behind the rows of dt's projection.
void scan(const MambaStep &m, Range channels, const Work &work) {
  constexpr int V = lanes<float>;
  const int64_t N = m.state, D = m.dim, shared_stride = m.rank + 2 * N;
  float *A2 = work.own;  // (V, state), exp(A_log): all that is left to do to it is one product and a power of two
  for (int64_t first = channels.first; first < channels.last; first += V) {
    const int64_t left = channels.last - first, count = left < V ? left : V;
    for (int64_t i = 0; i < count * N; i += V)
      store_some(A2 + i, exp<float>(load_values(m.A_log, first * N + i, count * N - i)), count * N - i);
    for (int64_t b = 0; b < work.batch; ++b) {
      const float *B = work.shared + b * shared_stride + m.rank, *C = B + N;
      const float *x = work.projected + b * 2 * D + first, *z = x + D;
      float *dt = work.inner + b * D + first, *h = m.ssm + (b * D + first) * N;
      const Vec<float> step = softplus<float>(load_some(dt, left)), u = load_some(x, left);
      float exponent[V], input[V];
      store(exponent, step * fill(-log2_e<float>));
      store(input, step * u);
      const Vec<float> y = N % V == 0 ? advance_channels<true>(h, A2, B, C, exponent, input, count, N)
                                      : advance_channels<false>(h, A2, B, C, exponent, input, count, N);
      store_some(dt, (y + load_values(m.D, first, left) * u) * silu(load_some(z, left)), left);
    }
  }
}

}  // namespace

void advance(const MambaStep &m, bool residual, const Work &work) {
  const int64_t D = m.dim, rows = 2 * D, shared_stride = m.rank + 2 * m.state;
  const Range mine = work.share(rows, row_block);
  project(m.in_proj, {work.input, work.batch, work.d_model}, mine, work.projected, rows);
  convolve(m.conv, mine.within(0, D), work.batch, work.projected, rows);
  work.barrier();
  project(m.x_proj, {work.projected, work.batch, rows}, work.share(shared_stride, 4), work.shared, shared_stride);
  work.barrier();
  const Range channels = work.share(D, row_block);
  project(m.dt_proj, {work.shared, work.batch, shared_stride}, channels, work.inner, D);
  scan(m, channels, work);
  work.barrier();
  project_to_hidden(m.out_proj, {work.inner, work.batch, D}, residual, work);
}

WorkSizes work_sizes(const MambaStep &m, int64_t batch) {
  return {batch * 2 * m.dim, batch * m.dim, batch * (m.rank + 2 * m.state), 0, lanes<float> * m.state};
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
