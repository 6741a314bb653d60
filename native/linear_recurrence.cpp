// The recurrence behind Mamba-2 and Mamba-3: a matrix of state for each head, decaying at one rate.
//
//     s_t = a_t s_{t-1} + scale_t sum_r v_tr k_tr^T
//     y_tr = a_t s_{t-1} q_tr + own_t sum_r' (k_tr' . q_tr) v_tr' + D v_tr,   times silu(z_t) where there is a gate
//
// ops/reference/ssd.py (own = scale, rank 1) and ops/reference/mamba3_scan.py are the definitions. A task takes a block
// of a head's channels through time with its states in the first-level cache. With rank 1, four steps are taken at each
// pass over the states, which are then read and written once for all of them and enter two products a step, not three:
//
//     y_t = P_t (s_0 q_t) + own_t (k_t . q_t) v_t + sum_{j < t} E_tj (k_j . q_t) scale_j v_j
//     E_tj = a_{j+1} ... a_t,   P_t = a_1 ... a_t
//     s_4 = P_4 s_0 + sum_j E_4j scale_j v_j k_j^T
#include "rows.hpp"
#include "scratch.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

constexpr int steps_per_pass = 4, least_steps_for_a_pass = 2;
template <typename S>
constexpr int block_size = 4 * lanes<S>;  // channels of a task

struct Task {
  int64_t sequence, head, first;  // channels [first, first + count) of the head
  int count;
};

// Rows of one pass, in the type of sums: up to `steps_per_pass` steps of rank 1, or one step of any rank.
template <typename S>
struct Pass {
  S *v, *scaled, *y;  // (rows, block)
  S *k, *q;           // (rows, state)
  S *decay, *own;     // (rows)

  static int64_t rows(int64_t rank) { return rank > steps_per_pass ? rank : steps_per_pass; }
  static int64_t size(int64_t rank, int64_t state) { return rows(rank) * (3 * block_size<S> + 2 * state + 2); }

  Pass(S *memory, int64_t rank, int64_t state) {
    const int64_t n = rows(rank);
    v = memory;
    scaled = v + n * block_size<S>;
    y = scaled + n * block_size<S>;
    k = y + n * block_size<S>;
    q = k + n * state;
    decay = q + n * state;
    own = decay + n;
  }
};

template <typename S>
S at(const void *values, const LinearRecurrence &p, int64_t entry, int64_t time, int64_t head) {
  return static_cast<const S *>(values)[(entry * p.sequences.length + time) * p.heads + head];
}

// Row `row` of a pass: step `time` of the sequence, rank `rank`.
template <typename T, typename S>
void read_row_of_pass(const LinearRecurrence &p, const Task &task, int64_t time, int64_t rank, int64_t row,
                      const Pass<S> &pass) {
  constexpr int K = block_size<S>;
  const int64_t entry = p.sequences.entry(task.sequence), t = p.sequences.start(task.sequence) + time, N = p.state;
  const int64_t group = task.head / (p.heads / p.groups);
  S *v = pass.v + row * K, *scaled = pass.scaled + row * K, *y = pass.y + row * K;
  read_row(row_of<const T>(p.v, entry, t, rank, task.head) + task.first, task.count, K, v);
  read_row(row_of<const T>(p.k, entry, t, rank, group), int(N), int(N), pass.k + row * N);
  read_row(row_of<const T>(p.q, entry, t, rank, group), int(N), int(N), pass.q + row * N);
  pass.decay[row] = std::exp(at<S>(p.log_decay, p, entry, t, task.head));
  const S scale = at<S>(p.scale, p, entry, t, task.head);
  pass.own[row] = p.own ? at<S>(p.own, p, entry, t, task.head) : scale;
  const S *D = p.D ? static_cast<const S *>(p.D) + task.head * p.headdim + task.first : nullptr;
  for (int c = 0; c < K; ++c) {
    scaled[c] = scale * v[c];
    y[c] = D && c < task.count ? D[c] * v[c] : S(0);
  }
}

// A row that changes nothing: the pass has fewer steps than it has room for.
template <typename S>
void idle_row_of_pass(int64_t row, int64_t N, const Pass<S> &pass) {
  for (int64_t c = row * block_size<S>; c < (row + 1) * block_size<S>; ++c)
    pass.v[c] = pass.scaled[c] = pass.y[c] = S(0);
  for (int64_t n = 0; n < N; ++n) pass.k[row * N + n] = pass.q[row * N + n] = S(0);
  pass.decay[row] = S(1);
  pass.own[row] = S(0);
}

template <typename S>
S dot(const S *a, const S *b, int64_t size) {
  int64_t i = 0;
  Vec<S> sums = fill(S(0));
  for (; i + lanes<S> <= size; i += lanes<S>) sums = sums + load(a + i) * load(b + i);
  S total = sum_of_lanes<S>(sums);
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

// Several steps of rank 1.
template <typename S>
void advance_steps(const Pass<S> &pass, int64_t N, S *h) {
  constexpr int K = block_size<S>, V = lanes<S>, T = steps_per_pass;
  S from_start[T], to_end[T], between[T][T];  // P_t; E_4j; E_tj (k_j . q_t), on the diagonal own_t (k_t . q_t)
  for (int t = 0; t < T; ++t) {
    from_start[t] = t == 0 ? pass.decay[0] : from_start[t - 1] * pass.decay[t];
    S decay = S(1);
    for (int j = t; j >= 0; --j) {
      between[t][j] = (j == t ? pass.own[t] : decay) * dot(pass.k + j * N, pass.q + t * N, N);
      if (t == T - 1) to_end[j] = decay;
      decay *= pass.decay[j];
    }
  }
  // Two vectors of channels at a time share each element of k and q.
  for (int c = 0; c < K; c += 2 * V) {
    Vec<S> in[T][2], y[T][2];
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < 2; ++i) {
        in[t][i] = load(pass.scaled + t * K + c + i * V) * fill(to_end[t]);
        y[t][i] = fill(S(0));
      }
    const Vec<S> whole = fill(from_start[T - 1]);
    for (int64_t n = 0; n < N; ++n) {
      const Vec<S> first = load(h + n * K + c), second = load(h + n * K + c + V);
      Vec<S> next_first = first * whole, next_second = second * whole;
      for (int t = 0; t < T; ++t) {
        const Vec<S> k = fill(pass.k[t * N + n]), q = fill(pass.q[t * N + n]);
        y[t][0] = y[t][0] + first * q;
        y[t][1] = y[t][1] + second * q;
        next_first = next_first + in[t][0] * k;
        next_second = next_second + in[t][1] * k;
      }
      store(h + n * K + c, next_first);
      store(h + n * K + c + V, next_second);
    }
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < 2; ++i) {
        S *row = pass.y + t * K + c + i * V;
        Vec<S> out = load(row) + y[t][i] * fill(from_start[t]);
        out = out + load(pass.v + t * K + c + i * V) * fill(between[t][t]);
        for (int j = 0; j < t; ++j) out = out + load(pass.scaled + j * K + c + i * V) * fill(between[t][j]);
        store(row, out);
      }
  }
}

// One step of any rank: all read the state before any enters it, and then what enters.
template <typename S>
void advance_ranks(const Pass<S> &pass, int64_t rank, int64_t N, S *h) {
  constexpr int K = block_size<S>, V = lanes<S>;
  for (int c = 0; c < K; c += V) {
    const Vec<S> a = fill(pass.decay[0]);
    for (int64_t n = 0; n < N; ++n) {
      const Vec<S> decayed = load(h + n * K + c) * a;
      Vec<S> next = decayed;
      for (int64_t r = 0; r < rank; ++r) {
        S *y = pass.y + r * K + c;
        store(y, load(y) + decayed * fill(pass.q[r * N + n]));
        next = next + load(pass.scaled + r * K + c) * fill(pass.k[r * N + n]);
      }
      store(h + n * K + c, next);
    }
  }
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t j = 0; j < rank; ++j) {
      const Vec<S> weight = fill(pass.own[0] * dot(pass.k + j * N, pass.q + r * N, N));
      for (int64_t c = 0; c < K; c += V)
        store(pass.y + r * K + c, load(pass.y + r * K + c) + load(pass.v + j * K + c) * weight);
    }
}

template <typename T, typename S>
void write_row_of_pass(const LinearRecurrence &p, const Task &task, int64_t time, int64_t rank, int64_t row,
                       const Pass<S> &pass, S *gate) {
  constexpr int K = block_size<S>;
  const int64_t entry = p.sequences.entry(task.sequence), t = p.sequences.start(task.sequence) + time;
  S *y = pass.y + row * K;
  if (p.z.data) {
    read_row(row_of<const T>(p.z, entry, t, 0, task.head) + task.first, task.count, K, gate);
    for (int c = 0; c < K; c += lanes<S>) {
      const Vec<S> z = load(gate + c);
      store(y + c, load(y + c) * z * sigmoid<S>(z));
    }
  }
  write_row(y, task.count, row_of<T>(p.y, entry, t, rank, task.head) + task.first);
}

// States of a task between (headdim, state) in memory and (state, block) here.
template <typename S>
S *states_of(void *states, const LinearRecurrence &p, int64_t slot, const Task &task) {
  return static_cast<S *>(states) + ((slot * p.heads + task.head) * p.headdim + task.first) * p.state;
}
template <typename S>
void read_states(const LinearRecurrence &p, const Task &task, S *h) {
  const S *from = p.initial_state ? states_of<S>(const_cast<void *>(p.initial_state), p, task.sequence, task) : nullptr;
  for (int64_t n = 0; n < p.state; ++n)
    for (int c = 0; c < block_size<S>; ++c)
      h[n * block_size<S> + c] = from && c < task.count ? from[c * p.state + n] : S(0);
}
template <typename S>
void write_states(const LinearRecurrence &p, const Task &task, int64_t slot, const S *h, void *target) {
  S *to = states_of<S>(target, p, slot, task);
  for (int c = 0; c < task.count; ++c)
    for (int64_t n = 0; n < p.state; ++n) to[c * p.state + n] = h[n * block_size<S> + c];
}

// Where the state before a chunk is kept: chunk by chunk over the batch, or sequence by sequence of a pack.
int64_t kept_slot(const LinearRecurrence &p, int64_t sequence, int64_t chunk) {
  if (!p.sequences.bounds) return chunk * p.sequences.batch + sequence;
  int64_t slot = chunk;
  for (int64_t s = 0; s < sequence; ++s) slot += ceil_divide(p.sequences.size(s), p.chunk);
  return slot;
}

template <typename T, typename S>
void run_task(const LinearRecurrence &p, const Task &task, S *memory) {
  const int64_t N = p.state, size = p.sequences.size(task.sequence);
  const int64_t first_slot = kept_slot(p, task.sequence, 0);
  S *h = memory, *gate = memory + N * block_size<S>;
  const Pass<S> pass(gate + block_size<S>, p.rank, N);
  read_states(p, task, h);

  for (int64_t t = 0; t < size;) {
    const int64_t in_chunk = t % p.chunk, left = size - t, until_chunk = p.chunk - in_chunk;
    if (p.kept && in_chunk == 0) {
      const int64_t chunk = t / p.chunk, stride = p.sequences.bounds ? 1 : p.sequences.batch;
      write_states(p, task, first_slot + chunk * stride, h, p.kept);
    }
    int64_t steps = left < steps_per_pass ? left : steps_per_pass;
    steps = steps < until_chunk ? steps : until_chunk;
    if (p.rank == 1 && steps >= least_steps_for_a_pass) {
      for (int64_t row = 0; row < steps_per_pass; ++row)
        if (row < steps) read_row_of_pass<T>(p, task, t + row, 0, row, pass);
        else idle_row_of_pass(row, N, pass);
      advance_steps(pass, N, h);
      for (int64_t row = 0; row < steps; ++row) write_row_of_pass<T>(p, task, t + row, 0, row, pass, gate);
    } else {
      steps = 1;
      for (int64_t r = 0; r < p.rank; ++r) read_row_of_pass<T>(p, task, t, r, r, pass);
      advance_ranks(pass, p.rank, N, h);
      for (int64_t r = 0; r < p.rank; ++r) write_row_of_pass<T>(p, task, t, r, r, pass, gate);
    }
    t += steps;
  }
  write_states(p, task, task.sequence, h, p.final_state);
}

template <typename T, typename S>
void run(const LinearRecurrence &p) {
  const int64_t blocks = ceil_divide(p.headdim, block_size<S>), tasks = p.sequences.count * p.heads * blocks;
  Scratch<S> scratch(p.threads, (p.state + 1) * block_size<S> + Pass<S>::size(p.rank, p.state));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t first = i % blocks * block_size<S>, left = p.headdim - first;
    const int count = int(left < block_size<S> ? left : block_size<S>);
    const Task task{i / blocks / p.heads, i / blocks % p.heads, first, count};
    run_task<T, S>(p, task, scratch.mine());
  }
}

}  // namespace

void linear_recurrence(const LinearRecurrence &p) {
  switch (p.dtype) {
    case Dtype::float32: return run<float, float>(p);
    case Dtype::float64: return run<double, double>(p);
    case Dtype::bfloat16: return run<bfloat16, float>(p);
    case Dtype::float16: return run<float16, float>(p);
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
