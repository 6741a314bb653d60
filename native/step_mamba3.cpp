// One token through a Mamba-3 mixer: src/mambakit/nn/mamba3.py and ops/reference/mamba3_scan.py are the definition.
#include "step_head.hpp"
#include "step_work.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

constexpr double pi = 3.14159265358979323846;

// What in_proj makes, in its order.
struct Projected {
  const float *z, *x, *B, *C, *dt, *A, *trap, *turns;

  Projected(const Mamba3Step &m, const float *row) {
    const int64_t dim = m.heads * m.headdim, vectors = m.rank * m.groups * m.state;
    z = row;
    x = z + dim;
    B = x + dim;
    C = B + vectors;
    dt = C + vectors;
    A = dt + m.heads;
    trap = A + m.heads;
    turns = trap + m.heads;
  }
};

// A thread's memory for one head. The keys and weights of the last step come first, then those of this one.
struct HeadMemory {
  float *keys, *queries;  // (2 rank, state) and (rank, state)
  float *weights, *y;     // (2 rank, headdim) and (rank, headdim)
  float *cos, *sin;       // (pairs)

  static int64_t size(const Mamba3Step &m) {
    return 3 * m.rank * m.state + 3 * m.rank * m.headdim + 2 * m.pairs;
  }

  HeadMemory(const Mamba3Step &m, float *memory) {
    keys = memory;
    queries = keys + 2 * m.rank * m.state;
    weights = queries + m.rank * m.state;
    y = weights + 2 * m.rank * m.headdim;
    cos = y + m.rank * m.headdim;
    sin = cos + m.pairs;
  }
};

// turns = pi tanh(turns): per unit of dt, in radians.
void bound_turns(float *turns, int64_t count) {
  for (int64_t i = 0; i < count; ++i) turns[i] = float(pi) * std::tanh(turns[i]);
}

// angle = angle + turn dt without whole turns, and its cosine and sine. In double, as the sum over a sequence is.
void turn(float *angle, const float *turns, float dt, int64_t pairs, float *cos, float *sin) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double sum = double(angle[i]) + double(turns[i] * dt);
    angle[i] = float(sum - 2 * pi * std::floor(sum / (2 * pi)));
  }
  // With r = angle - pi: sin(angle) = -sin(r) = -2 sin(r/2) cos(r/2), cos(angle) = -cos(r) = 2 sin^2(r/2) - 1. The
  // power series for |r/2| <= pi/2 end where the next term is below float's rounding.
  for (int64_t i = 0; i < pairs; i += lanes<float>) {
    const int64_t left = pairs - i;
    const Vec<float> r = load_some(angle + i, left) - fill(3.14159274f) + fill(8.74227766e-8f);  // pi in two parts
    const Vec<float> t = r * fill(0.5f), q = t * t;
    Vec<float> s = fill(-1 / 39916800.0f), c = fill(1 / 479001600.0f);
    s = s * q + fill(1 / 362880.0f);
    s = s * q + fill(-1 / 5040.0f);
    s = s * q + fill(1 / 120.0f);
    s = s * q + fill(-1 / 6.0f);
    s = (s * q + fill(1.0f)) * t;
    c = c * q + fill(-1 / 3628800.0f);
    c = c * q + fill(1 / 40320.0f);
    c = c * q + fill(-1 / 720.0f);
    c = c * q + fill(1 / 24.0f);
    c = c * q + fill(-0.5f);
    c = c * q + fill(1.0f);
    store_some(cos + i, fill(2.0f) * s * s - fill(1.0f), left);
    store_some(sin + i, fill(-2.0f) * s * c, left);
  }
}

void rotate(float *vector, const Mamba3Step &m, const float *cos, const float *sin) {
  const int64_t apart = m.interleaved ? 1 : m.state / 2, stride = m.interleaved ? 2 : 1;
  for (int64_t i = 0; i < m.pairs; ++i) {
    float &first = vector[i * stride], &second = vector[i * stride + apart];
    const float a = first, b = second;
    first = a * cos[i] - b * sin[i];
    second = a * sin[i] + b * cos[i];
  }
}

// Rot(norm(B) + bias) of every rank of a head, from B (rank, groups, state) to (rank, state); C likewise.
void rotated(const Mamba3Step &m, const float *vectors, const Norm &norm, const Parameter &bias, int64_t head,
             const HeadMemory &own, float *to) {
  const int64_t N = m.state, group = head / (m.heads / m.groups);
  for (int64_t r = 0; r < m.rank; ++r, to += N) {
    normalise(vectors + (r * m.groups + group) * N, N, norm, 0, to);
    for (int64_t n = 0; n < N; n += lanes<float>)
      store_some(to + n, load_some(to + n, N - n) + load_values(bias, (head * m.rank + r) * N + n, N - n), N - n);
    rotate(to, m, own.cos, own.sin);
  }
}

// (rank, headdim): scale x, for each rank times its weight of `mimo` (heads, rank, headdim).
void spread(const Mamba3Step &m, const float *x, float scale, const Parameter &mimo, int64_t head, float *to) {
  const int64_t P = m.headdim;
  for (int64_t r = 0; r < m.rank; ++r)
    for (int64_t p = 0; p < P; p += lanes<float>) {
      Vec<float> v = fill(scale) * load_some(x + p, P - p);
      if (mimo.data) v = v * load_values(mimo, (head * m.rank + r) * P + p, P - p);
      store_some(to + r * P + p, v, P - p);
    }
}

// out (headdim) = sum over ranks of mimo_o norm(y + D v) silu(mimo_z z).
void gate(const Mamba3Step &m, const float *x, const float *z, int64_t head, const HeadMemory &own, float *out) {
  const int64_t P = m.headdim;
  for (int64_t r = 0; r < m.rank; ++r) {
    float *y = own.y + r * P;
    const int64_t of_rank = (head * m.rank + r) * P;
    for (int64_t p = 0; p < P; p += lanes<float>) {
      Vec<float> v = load_some(x + p, P - p);
      if (m.mimo_x.data) v = v * load_values(m.mimo_x, of_rank + p, P - p);
      store_some(y + p, load_some(y + p, P - p) + fill(value(m.D, head)) * v, P - p);
    }
    if (m.norm.weight.data) normalise(y, P, m.norm, head * P, y);
    for (int64_t p = 0; p < P; p += lanes<float>) {
      Vec<float> opened = load_some(z + p, P - p), sum = load_some(y + p, P - p);
      if (m.mimo_z.data) opened = opened * load_values(m.mimo_z, of_rank + p, P - p);
      sum = sum * silu(opened);
      if (m.mimo_o.data) sum = sum * load_values(m.mimo_o, of_rank + p, P - p);
      store_some(out + p, r > 0 ? load_some(out + p, P - p) + sum : sum, P - p);
    }
  }
}

float rate(const Mamba3Step &m, float a) {
  const float f = !m.rational ? scalar_softplus(a) : a >= 0 ? 1 + a : 1 / (1 - a);
  return f < m.A_floor ? -m.A_floor : -f;
}

void advance_head(const Mamba3Step &m, int64_t b, int64_t head, const Projected &in, const HeadMemory &own,
                  float *out) {
  const int64_t P = m.headdim, N = m.state, R = m.rank, at = b * m.heads + head;
  const float dt = scalar_softplus(in.dt[head] + value(m.dt_bias, head)), present = scalar_sigmoid(in.trap[head]);
  const float decay = std::exp(dt * rate(m, in.A[head]));
  turn(m.angle + at * m.pairs, in.turns, dt, m.pairs, own.cos, own.sin);

  const float *x = in.x + head * P;
  float *last_x = m.v + at * P, *last_keys = m.k + (b * R * m.heads + head) * N;
  for (int64_t r = 0; r < R; ++r) std::memcpy(own.keys + r * N, last_keys + r * m.heads * N, size_t(N) * sizeof(float));
  rotated(m, in.B, m.B_norm, m.B_bias, head, own, own.keys + R * N);
  rotated(m, in.C, m.C_norm, m.C_bias, head, own, own.queries);
  spread(m, last_x, (1 - present) * dt * decay, m.mimo_x, head, own.weights);
  spread(m, x, present * dt, m.mimo_x, head, own.weights + R * P);
  advance_state(m.ssm + at * P * N, P, N, decay, {own.weights, own.keys, 2 * R, P, N}, {own.queries, R, N}, own.y);

  for (int64_t r = 0; r < R; ++r)
    std::memcpy(last_keys + r * m.heads * N, own.keys + (R + r) * N, size_t(N) * sizeof(float));
  std::memcpy(last_x, x, size_t(P) * sizeof(float));
  gate(m, x, in.z + head * P, head, own, out);
}

}  // namespace

void advance(const Mamba3Step &m, bool residual, const Work &work) {
  const int64_t dim = m.heads * m.headdim, rows = m.in_proj.rows;
  const Range mine = work.share(rows, row_block), turns = mine.within(rows - m.pairs, rows);
  project(m.in_proj, {work.input, work.batch, work.d_model}, mine, work.projected, rows);
  for (int64_t b = 0; b < work.batch; ++b) bound_turns(work.projected + b * rows + turns.first, turns.size());
  work.barrier();
  const Range tasks = work.share(work.batch * m.heads, 1);
  const HeadMemory own(m, work.own);
  for (int64_t task = tasks.first; task < tasks.last; ++task) {
    const int64_t b = task / m.heads, head = task % m.heads;
    advance_head(m, b, head, Projected(m, work.projected + b * rows), own, work.inner + b * dim + head * m.headdim);
  }
  work.barrier();
  project_to_hidden(m.out_proj, {work.inner, work.batch, dim}, residual, work);
}

WorkSizes work_sizes(const Mamba3Step &m, int64_t batch) {
  return {batch * m.in_proj.rows, batch * m.heads * m.headdim, 0, 0, HeadMemory::size(m)};
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
