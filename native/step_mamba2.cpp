// One token through a Mamba-2 mixer: src/mambakit/nn/mamba2.py is the definition.
#include "step_head.hpp"
#include "step_work.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

// One step of a head: from the row `projected` (z, x, B, C, dt) of its sequence, x, B and C convolved, to y (headdim).
void advance_head(const Mamba2Step &m, int64_t b, int64_t head, const float *projected, float *own, float *y) {
  const int64_t P = m.headdim, N = m.state, dim = m.heads * P, group = head / (m.heads / m.groups);
  const float *z = projected + head * P, *x = z + dim, *B = projected + 2 * dim + group * N, *C = B + m.groups * N;
  float dt = scalar_softplus(projected[2 * dim + 2 * m.groups * N + head] + value(m.dt_bias, head));
  dt = dt < m.dt_min ? m.dt_min : dt > m.dt_max ? m.dt_max : dt;
  const float decay = std::exp(-std::exp(value(m.A_log, head)) * dt);
  float *weights = own;  // (headdim)
  for (int64_t p = 0; p < P; ++p) weights[p] = dt * x[p];
  advance_state(m.ssm + (b * m.heads + head) * P * N, P, N, decay, {weights, B, 1, P, N}, {C, 1, N}, y);

  for (int64_t p = 0; p < P; p += lanes<float>) {
    const int64_t left = P - p;
    const Vec<float> D = m.D_has_headdim ? load_values(m.D, head * P + p, left) : fill(value(m.D, head));
    Vec<float> out = load_some(y + p, left) + D * load_some(x + p, left);
    if (!m.norm.weight.data || !m.norm_before_gate) out = out * silu(load_some(z + p, left));
    store_some(y + p, out, left);
  }
}

// The norm of y (dim) in its groups, and the gate where it comes after.
void normalise_groups(const Mamba2Step &m, const float *y, const float *z, float *out) {
  const int64_t dim = m.heads * m.headdim, size = dim / m.groups;
  for (int64_t first = 0; first < dim; first += size) normalise(y + first, size, m.norm, first, out + first);
  if (!m.norm_before_gate) return;
  for (int64_t c = 0; c < dim; c += lanes<float>)
    store_some(out + c, load_some(out + c, dim - c) * silu(load_some(z + c, dim - c)), dim - c);
}

}  // namespace

void advance(const Mamba2Step &m, bool residual, const Work &work) {
  const int64_t dim = m.heads * m.headdim, rows = m.in_proj.rows;
  const Range mine = work.share(rows, row_block), convolved = mine.within(dim, dim + m.conv.channels);
  project(m.in_proj, {work.input, work.batch, work.d_model}, mine, work.projected, rows);
  convolve(m.conv, {convolved.first - dim, convolved.last - dim}, work.batch, work.projected + dim, rows);
  work.barrier();
  const Range tasks = work.share(work.batch * m.heads, 1);
  for (int64_t task = tasks.first; task < tasks.last; ++task) {
    const int64_t b = task / m.heads, head = task % m.heads;
    advance_head(m, b, head, work.projected + b * rows, work.own, work.inner + b * dim + head * m.headdim);
  }
  work.barrier();
  const float *y = work.inner;
  if (m.norm.weight.data) {  // by every thread for itself: less work than another barrier
    for (int64_t b = 0; b < work.batch; ++b)
      normalise_groups(m, work.inner + b * dim, work.projected + b * rows, work.input + b * dim);
    y = work.input;
  }
  project_to_hidden(m.out_proj, {y, work.batch, dim}, residual, work);
}

WorkSizes work_sizes(const Mamba2Step &m, int64_t batch) {
  const int64_t dim = m.heads * m.headdim;
  return {batch * m.in_proj.rows, batch * dim, 0, batch * dim, m.headdim};
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
