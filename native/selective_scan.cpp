// Selective scan, forward and backward: ops/reference/selective_scan.py is the definition.
//
// A task takes a block of channels of one sequence through time, its states in the nearest cache, one vector of
// channels at a time with the states of a channel in the inner loop. The backward walks the checkpoints from the last
// to the first: it recomputes the states of one chunk, then sweeps that chunk backwards. Nothing of size
// (length, dim, state) is kept. Sums over channels and sequences are made in an order that does not depend on the
// number of threads, so results are equal bit for bit whatever that number is.
#include <initializer_list>

#include "rows.hpp"
#include "scratch.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

template <typename S>
constexpr int block_size = 4 * lanes<S>;  // channels of a task
constexpr int64_t ahead = 8;              // steps between asking for a row and using it

// Asks for the rows of a block that step `time` will use.
template <typename T>
MAMBAKIT_INLINE void prefetch(std::initializer_list<const Rows *> inputs, int64_t entry, int64_t time, int64_t first,
                              int count) {
  for (const Rows *rows : inputs)
    if (rows->data) prefetch_row(row_of<const T>(*rows, entry, time) + first, count);
}

// The channels [first, first + count) of one group.
struct Block {
  int64_t group, first;
  int count;
};

// The parameters of a block, channels last, padded with zeros.
template <typename S>
struct BlockParameters {
  S *A;   // (state, block)
  S *A2;  // A / ln 2: decays are powers of two
  S *D, *bias;

  static constexpr int64_t size(int64_t state) { return (2 * state + 2) * block_size<S>; }

  BlockParameters(S *memory, int64_t state)
      : A(memory), A2(A + state * block_size<S>), D(A2 + state * block_size<S>), bias(D + block_size<S>) {}

  void read(const ScanForward &p, const Block &block) {
    const S *rate = static_cast<const S *>(p.A), *skip = static_cast<const S *>(p.D),
            *shift = static_cast<const S *>(p.bias);
    for (int c = 0; c < block_size<S>; ++c) {
      const bool inside = c < block.count;
      const int64_t channel = block.first + c;
      for (int64_t n = 0; n < p.state; ++n) {
        A[n * block_size<S> + c] = inside ? rate[channel * p.state + n] : S(0);
        A2[n * block_size<S> + c] = A[n * block_size<S> + c] * log2_e<S>;
      }
      D[c] = inside && skip ? skip[channel] : S(0);
      bias[c] = inside && shift ? shift[channel] : S(0);
    }
  }
};

// States of a block between (dim, state) in memory and (state, block) here; null reads as zero and takes nothing.
template <typename S>
void read_states(const void *source, int64_t sequence, const ScanForward &p, const Block &block, S *h) {
  const S *from = static_cast<const S *>(source);
  for (int64_t n = 0; n < p.state; ++n)
    for (int c = 0; c < block_size<S>; ++c)
      h[n * block_size<S> + c] =
          from && c < block.count ? from[(sequence * p.dim + block.first + c) * p.state + n] : S(0);
}
template <typename S>
void write_states(const S *h, int64_t sequence, const ScanForward &p, const Block &block, void *target) {
  S *to = static_cast<S *>(target);
  if (!to) return;
  for (int c = 0; c < block.count; ++c)
    for (int64_t n = 0; n < p.state; ++n)
      to[(sequence * p.dim + block.first + c) * p.state + n] = h[n * block_size<S> + c];
}

template <typename S>
S *checkpoint(const ScanForward &p, int64_t slot, int64_t n, const Block &block) {
  return static_cast<S *>(p.checkpoints) + (slot * p.state + n) * p.dim + block.first;
}

template <typename T, typename S>
void forward_block(const ScanForward &p, int64_t s, const Block &block, S *memory) {
  constexpr int K = block_size<S>, V = lanes<S>, vectors = K / V;
  const int64_t N = p.state, entry = p.sequences.entry(s), start = p.sequences.start(s), size = p.sequences.size(s);
  BlockParameters<S> parameters(memory, N);
  S *h = memory + BlockParameters<S>::size(N), *B = h + N * K, *C = B + N, *dt = C + N, *u = dt + K, *z = u + K;
  parameters.read(p, block);
  read_states(p.initial_state, s, p, block, h);
  const S *A2 = parameters.A2;

  for (int64_t t = 0; t < size; ++t) {
    if (p.checkpoints && t % p.chunk == 0)
      for (int64_t n = 0; n < N; ++n)
        write_row(h + n * K, block.count, checkpoint<S>(p, p.sequences.slot(s, p.chunk) + t / p.chunk, n, block));
    if (t + ahead < size)
      prefetch<T>({&p.u, &p.delta, &p.z, &p.out}, entry, start + t + ahead, block.first, block.count);
    read_row(row_of<const T>(p.u, entry, start + t) + block.first, block.count, K, u);
    read_row(row_of<const T>(p.delta, entry, start + t) + block.first, block.count, K, dt);
    if (p.z.data) read_row(row_of<const T>(p.z, entry, start + t) + block.first, block.count, K, z);
    read_row(row_of<const T>(p.B, entry, start + t) + block.group * p.B.group_stride, int(N), int(N), B);
    read_row(row_of<const T>(p.C, entry, start + t) + block.group * p.C.group_stride, int(N), int(N), C);

    Vec<S> step[vectors], input[vectors], y[vectors];
    for (int i = 0; i < vectors; ++i) {
      step[i] = load(dt + i * V) + load(parameters.bias + i * V);
      if (p.softplus) step[i] = softplus<S>(step[i]);
      const Vec<S> x = load(u + i * V);
      input[i] = step[i] * x;
      y[i] = load(parameters.D + i * V) * x;
    }
    for (int64_t n = 0; n < N; ++n) {
      const Vec<S> B_n = fill(B[n]), C_n = fill(C[n]);
      for (int i = 0; i < vectors; ++i) {
        const int64_t at = n * K + i * V;
        const Vec<S> state = exp2(step[i] * load(A2 + at)) * load(h + at) + input[i] * B_n;
        store(h + at, state);
        y[i] = y[i] + state * C_n;
      }
    }
    for (int i = 0; i < vectors; ++i) {
      if (p.z.data) {
        const Vec<S> gate = load(z + i * V);
        y[i] = y[i] * gate * sigmoid<S>(gate);
      }
      store(u + i * V, y[i]);
    }
    write_row(u, block.count, row_of<T>(p.out, entry, start + t) + block.first);
  }
  write_states(h, s, p, block, p.final_state);
}

template <typename T, typename S>
void forward(const ScanForward &p) {
  const int64_t group_dim = p.dim / p.groups, blocks = ceil_divide(group_dim, block_size<S>);
  const int64_t tasks = p.sequences.count * p.groups * blocks;
  const int64_t task_memory = BlockParameters<S>::size(p.state) + p.state * (block_size<S> + 2) + 3 * block_size<S>;
  Scratch<S> scratch(p.threads, task_memory);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t s = task / (p.groups * blocks), group = task / blocks % p.groups;
    const int64_t offset = task % blocks * block_size<S>;
    const int64_t left = group_dim - offset;
    const Block block{group, group * group_dim + offset, int(left < block_size<S> ? left : block_size<S>)};
    forward_block<T, S>(p, s, block, scratch.mine());
  }
}

// The gradients of B and C, summed over the channels of a slice of blocks; slices are summed at the end.
template <typename S>
struct SharedGradients {
  S *B, *C;  // (slices, batch * length, groups, state)
};

template <typename S>
struct BackwardMemory {
  BlockParameters<S> parameters;
  S *states;            // (chunk + 1, state, block): before each step of the chunk, and after the last
  S *decays;            // (chunk, state, block)
  S *dt, *slope, *u, *dy;  // (chunk, block); slope is the derivative of softplus
  S *carry, *grad_A;    // (state, block)
  S *grad_D, *grad_bias, *row, *other;  // (block)
  S *B, *C;             // (chunk, state)

  static int64_t size(int64_t state, int64_t chunk) {
    constexpr int64_t K = block_size<S>;
    return BlockParameters<S>::size(state) + (2 * chunk + 1) * state * K + 4 * chunk * K + 2 * state * K + 4 * K +
           2 * chunk * state;
  }

  BackwardMemory(S *memory, int64_t state, int64_t chunk) : parameters(memory, state) {
    constexpr int64_t K = block_size<S>;
    states = memory + BlockParameters<S>::size(state);
    decays = states + (chunk + 1) * state * K;
    dt = decays + chunk * state * K;
    slope = dt + chunk * K;
    u = slope + chunk * K;
    dy = u + chunk * K;
    carry = dy + chunk * K;
    grad_A = carry + state * K;
    grad_D = grad_A + state * K;
    grad_bias = grad_D + K;
    row = grad_bias + K;
    other = row + K;
    B = other + K;
    C = B + chunk * state;
  }
};

// Runs the steps [first, first + steps) of a sequence again from the checkpoint before them, and takes the gradient
// through the gate z.
template <typename T, typename S>
void recompute_chunk(const ScanBackward &q, int64_t s, const Block &block, int64_t first, int64_t steps,
                     BackwardMemory<S> &m) {
  constexpr int K = block_size<S>, V = lanes<S>, vectors = K / V;
  const ScanForward &p = q.forward;
  const S *A2 = m.parameters.A2;
  const int64_t N = p.state, entry = p.sequences.entry(s), start = p.sequences.start(s) + first;
  const int64_t slot = p.sequences.slot(s, p.chunk) + first / p.chunk;
  for (int64_t n = 0; n < N; ++n) read_row(checkpoint<S>(p, slot, n, block), block.count, K, m.states + n * K);

  for (int64_t t = 0; t < steps; ++t) {
    S *u = m.u + t * K, *dt = m.dt + t * K, *dy = m.dy + t * K, *slope = m.slope + t * K;
    S *B = m.B + t * N, *C = m.C + t * N;
    const S *before = m.states + t * N * K;
    S *after = m.states + (t + 1) * N * K, *decay = m.decays + t * N * K;
    if (t + ahead < steps)
      prefetch<T>({&p.u, &p.delta, &p.z, &q.grad_out, &q.grad_z}, entry, start + t + ahead, block.first, block.count);
    read_row(row_of<const T>(p.u, entry, start + t) + block.first, block.count, K, u);
    read_row(row_of<const T>(p.delta, entry, start + t) + block.first, block.count, K, dt);
    read_row(row_of<const T>(q.grad_out, entry, start + t) + block.first, block.count, K, dy);
    if (p.z.data) read_row(row_of<const T>(p.z, entry, start + t) + block.first, block.count, K, m.row);
    read_row(row_of<const T>(p.B, entry, start + t) + block.group * p.B.group_stride, int(N), int(N), B);
    read_row(row_of<const T>(p.C, entry, start + t) + block.group * p.C.group_stride, int(N), int(N), C);

    Vec<S> step[vectors], input[vectors], y[vectors];
    for (int i = 0; i < vectors; ++i) {
      const int v = i * V;
      step[i] = load(dt + v) + load(m.parameters.bias + v);
      Vec<S> derivative = fill(S(1));
      if (p.softplus) {
        derivative = sigmoid<S>(step[i]);
        step[i] = softplus<S>(step[i]);
      }
      store(slope + v, derivative);
      store(dt + v, step[i]);
      const Vec<S> x = load(u + v);
      input[i] = step[i] * x;
      y[i] = load(m.parameters.D + v) * x;
    }
    for (int64_t n = 0; n < N; ++n) {
      const Vec<S> B_n = fill(B[n]), C_n = fill(C[n]);
      for (int i = 0; i < vectors; ++i) {
        const int64_t at = n * K + i * V;
        const Vec<S> a = exp2(step[i] * load(A2 + at));
        const Vec<S> state = a * load(before + at) + input[i] * B_n;
        store(decay + at, a);
        store(after + at, state);
        y[i] = y[i] + state * C_n;
      }
    }
    if (p.z.data)
      for (int i = 0; i < vectors; ++i) {
        const int v = i * V;
        const Vec<S> gate = load(m.row + v), on = sigmoid<S>(gate), grad = load(dy + v);
        store(dy + v, grad * gate * on);
        store(m.row + v, grad * y[i] * on * (fill(S(1)) + gate * (fill(S(1)) - on)));
      }
    if (p.z.data) write_row(m.row, block.count, row_of<T>(q.grad_z, entry, start + t) + block.first);
  }
}

// Sweeps the recomputed steps backwards. `m.carry` holds the gradient of the state after the chunk and leaves with that
// of the state before it.
template <typename T, typename S>
void sweep_chunk(const ScanBackward &q, int64_t s, const Block &block, int64_t first, int64_t steps, bool assign,
                 S *grad_B, S *grad_C, BackwardMemory<S> &m) {
  constexpr int K = block_size<S>, V = lanes<S>, vectors = K / V;
  const ScanForward &p = q.forward;
  const int64_t N = p.state, entry = p.sequences.entry(s), start = p.sequences.start(s) + first;
  const int64_t shared_row = entry * p.sequences.length + start;  // entry is 0 in a pack
  for (int64_t t = steps - 1; t >= 0; --t) {
    if (t >= ahead) prefetch<T>({&q.grad_u, &q.grad_delta}, entry, start + t - ahead, block.first, block.count);
    const S *before = m.states + t * N * K, *after = before + N * K, *decay = m.decays + t * N * K;
    const S *B = m.B + t * N, *C = m.C + t * N;
    S *row_B = grad_B + ((shared_row + t) * p.groups + block.group) * N;
    S *row_C = grad_C + ((shared_row + t) * p.groups + block.group) * N;
    Vec<S> step[vectors], x[vectors], input[vectors], dy[vectors], along_B[vectors], along_A[vectors];
    for (int i = 0; i < vectors; ++i) {
      step[i] = load(m.dt + t * K + i * V);
      x[i] = load(m.u + t * K + i * V);
      dy[i] = load(m.dy + t * K + i * V);
      input[i] = step[i] * x[i];
      along_B[i] = along_A[i] = fill(S(0));
    }
    for (int64_t n = 0; n < N; ++n) {
      Vec<S> sum_B = fill(S(0)), sum_C = fill(S(0));
      const Vec<S> B_n = fill(B[n]), C_n = fill(C[n]);
      for (int i = 0; i < vectors; ++i) {
        const int64_t at = n * K + i * V;
        const Vec<S> grad = load(m.carry + at) + dy[i] * C_n;  // of the state after step t
        const Vec<S> a = load(decay + at), kept = grad * a * load(before + at);
        sum_C = sum_C + dy[i] * load(after + at);
        sum_B = sum_B + grad * input[i];
        along_B[i] = along_B[i] + grad * B_n;
        along_A[i] = along_A[i] + kept * load(m.parameters.A + at);
        store(m.grad_A + at, load(m.grad_A + at) + kept * step[i]);
        store(m.carry + at, grad * a);
      }
      const S total_B = sum_of_lanes<S>(sum_B), total_C = sum_of_lanes<S>(sum_C);
      row_B[n] = assign ? total_B : row_B[n] + total_B;
      row_C[n] = assign ? total_C : row_C[n] + total_C;
    }
    for (int i = 0; i < vectors; ++i) {
      const int v = i * V;
      const Vec<S> grad_dt = (along_A[i] + along_B[i] * x[i]) * load(m.slope + t * K + v);
      store(m.row + v, grad_dt);
      store(m.other + v, along_B[i] * step[i] + dy[i] * load(m.parameters.D + v));
      store(m.grad_bias + v, load(m.grad_bias + v) + grad_dt);
      store(m.grad_D + v, load(m.grad_D + v) + dy[i] * x[i]);
    }
    write_row(m.row, block.count, row_of<T>(q.grad_delta, entry, start + t) + block.first);
    write_row(m.other, block.count, row_of<T>(q.grad_u, entry, start + t) + block.first);
  }
}

// Adds the block's parameter gradients to those of its range of sequences: (ranges, dim, state) and (ranges, dim).
template <typename S>
struct ParameterGradients {
  S *A, *D, *bias;

  void add(const BackwardMemory<S> &m, const ScanForward &p, const Block &block, int64_t range) const {
    for (int c = 0; c < block.count; ++c) {
      const int64_t channel = range * p.dim + block.first + c;
      for (int64_t n = 0; n < p.state; ++n) A[channel * p.state + n] += m.grad_A[n * block_size<S> + c];
      D[channel] += m.grad_D[c];
      bias[channel] += m.grad_bias[c];
    }
  }

  void total(const ScanBackward &q, int64_t ranges) const {
    sum(A, q.forward.dim * q.forward.state, ranges, q.grad_A);
    sum(D, q.forward.dim, ranges, q.grad_D);
    sum(bias, q.forward.dim, ranges, q.grad_bias);
  }

 private:
  static void sum(const S *parts, int64_t size, int64_t ranges, void *target) {
    if (!target) return;
    S *to = static_cast<S *>(target);
    for (int64_t i = 0; i < size; ++i) {
      S total = S(0);
      for (int64_t r = 0; r < ranges; ++r) total += parts[r * size + i];
      to[i] = total;
    }
  }
};

template <typename T, typename S>
void backward_block(const ScanBackward &q, int64_t s, const Block &block, bool assign, S *grad_B, S *grad_C,
                    BackwardMemory<S> &m) {
  constexpr int K = block_size<S>;
  const ScanForward &p = q.forward;
  const int64_t size = p.sequences.size(s), chunks = ceil_divide(size, p.chunk);
  m.parameters.read(p, block);
  read_states(q.grad_final_state, s, p, block, m.carry);
  for (int64_t i = 0; i < p.state * K; ++i) m.grad_A[i] = S(0);
  for (int i = 0; i < K; ++i) m.grad_D[i] = m.grad_bias[i] = S(0);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = chunk * p.chunk, left = size - first, steps = left < p.chunk ? left : p.chunk;
    recompute_chunk<T, S>(q, s, block, first, steps, m);
    sweep_chunk<T, S>(q, s, block, first, steps, assign, grad_B, grad_C, m);
  }
  write_states(m.carry, s, p, block, q.grad_initial_state);
}

template <typename T, typename S>
void write_shared(const S *parts, int64_t slices, const ScanForward &p, const Rows &target) {
  const int64_t rows = p.sequences.batch * p.sequences.length, row = p.groups * p.state;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < p.groups; ++g) {
      T *to = row_of<T>(target, r / p.sequences.length, r % p.sequences.length) + g * target.group_stride;
      for (int64_t n = 0; n < p.state; ++n) {
        S total = S(0);
        for (int64_t slice = 0; slice < slices; ++slice) total += parts[(slice * rows + r) * row + g * p.state + n];
        to[n] = narrow<T>(total);
      }
    }
}

template <typename T, typename S>
void backward(const ScanBackward &q) {
  const ScanForward &p = q.forward;
  const int64_t sequences = p.sequences.count, rows = p.sequences.batch * p.sequences.length;
  const int64_t group_dim = p.dim / p.groups, blocks = ceil_divide(group_dim, block_size<S>);
  // Enough tasks to keep many threads busy, few enough that their partial sums stay small.
  constexpr int64_t wanted = 16;
  const int64_t ranges = sequences < wanted / 2 ? (sequences > 0 ? sequences : 1) : wanted / 2;
  const int64_t asked = ceil_divide(wanted, ranges * p.groups), slices = blocks < asked ? blocks : asked;
  const int64_t tasks = ranges * p.groups * slices;

  Scratch<S> scratch(p.threads, BackwardMemory<S>::size(p.state, p.chunk));
  Scratch<S> shared(2, slices * rows * p.groups * p.state);
  Scratch<S> parameters(1, ranges * p.dim * (p.state + 2));
  parameters.clear();
  const ParameterGradients<S> partial{parameters.part(0), parameters.part(0) + ranges * p.dim * p.state,
                                      parameters.part(0) + ranges * p.dim * (p.state + 1)};
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t range = task / (p.groups * slices), group = task / slices % p.groups, slice = task % slices;
    BackwardMemory<S> m(scratch.mine(), p.state, p.chunk);
    S *grad_B = shared.part(0) + slice * rows * p.groups * p.state;
    S *grad_C = shared.part(1) + slice * rows * p.groups * p.state;
    const int64_t first_block = slice * blocks / slices, last_block = (slice + 1) * blocks / slices;
    for (int64_t s = range * sequences / ranges; s < (range + 1) * sequences / ranges; ++s)
      for (int64_t b = first_block; b < last_block; ++b) {
        const int64_t offset = b * block_size<S>, left = group_dim - offset;
        const Block block{group, group * group_dim + offset, int(left < block_size<S> ? left : block_size<S>)};
        backward_block<T, S>(q, s, block, b == first_block, grad_B, grad_C, m);
        partial.add(m, p, block, range);
      }
  }
  partial.total(q, ranges);
  write_shared<T, S>(shared.part(0), slices, p, q.grad_B);
  write_shared<T, S>(shared.part(1), slices, p, q.grad_C);
}

}  // namespace

void scan_forward(const ScanForward &p) {
  switch (p.dtype) {
    case Dtype::float32: return forward<float, float>(p);
    case Dtype::float64: return forward<double, double>(p);
    case Dtype::bfloat16: return forward<bfloat16, float>(p);
    case Dtype::float16: return forward<float16, float>(p);
  }
}

void scan_backward(const ScanBackward &q) {
  switch (q.forward.dtype) {
    case Dtype::float32: return backward<float, float>(q);
    case Dtype::float64: return backward<double, double>(q);
    case Dtype::bfloat16: return backward<bfloat16, float>(q);
    case Dtype::float16: return backward<float16, float>(q);
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
