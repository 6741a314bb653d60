// A chunk of the recurrence of Mamba-2 and Mamba-3: its sizes, where it lies, and how its steps weigh each other.
//
// A step has a row for each rank. With E_tj = a_{j+1} ... a_t the decay between two steps,
//
//     W_tj = E_tj scale_j for an earlier step j,   own_t for the same step,   0 for a later one
//     start_t = a_1 ... a_t,   end_j = E_last,j
//
// E is formed by products of the decays that it spans, never as a quotient of longer ones.
#pragma once

#include "products.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

template <typename S>
MAMBAKIT_INLINE int64_t whole_vectors(int64_t size) {
  return ceil_divide(size, lanes<S>) * lanes<S>;
}

// Hands out parts of one block of memory; without a block it only counts.
template <typename S>
class Arena {
 public:
  explicit Arena(S *memory) : memory_(memory) {}
  S *take(int64_t size) {
    S *part = memory_ ? memory_ + used_ : nullptr;
    used_ += ceil_divide(size, line) * line;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t line = 64 / int64_t(sizeof(S));
  S *memory_;
  int64_t used_ = 0;
};

template <typename S>
struct Sizes {
  int64_t rank, heads, groups, headdim, state, pairs, steps;  // steps: of a chunk, at most
  int64_t channels, half, columns, rows, row_columns;         // headdim, pairs, state, steps * rank padded to vectors

  explicit Sizes(const LinearRecurrence &p)
      : rank(p.rank), heads(p.heads), groups(p.groups), headdim(p.headdim), state(p.state), pairs(p.pairs),
        steps(p.chunk < p.sequences.length ? p.chunk : p.sequences.length) {
    channels = whole_vectors<S>(headdim);
    half = whole_vectors<S>(pairs);
    // The turned pairs come first, all their first coordinates before all their second ones.
    columns = 2 * half + whole_vectors<S>(state - 2 * pairs);
    rows = steps * rank;
    row_columns = whole_vectors<S>(rows);
  }
  // Where coordinate n of the state stands.
  int64_t place(int64_t n, bool interleaved) const {
    if (interleaved) return n >= 2 * pairs ? 2 * half + n - 2 * pairs : n % 2 == 0 ? n / 2 : half + n / 2;
    const int64_t middle = state / 2;
    if (pairs == 0) return n;
    if (n < middle) return n < pairs ? n : 2 * half + n - pairs;
    return n - middle < pairs ? half + n - middle : 2 * half + n - 2 * pairs;
  }
};

// Steps [start, start + steps) of the rows of `entry`; the first of `sequence` if `chunk` is 0.
struct Chunk {
  int64_t sequence, chunk, entry, start, steps, slot;
  bool last;
};

// The chunks of every sequence, one after the other.
class Chunks {
 public:
  explicit Chunks(const LinearRecurrence &p) : p_(p), first_(1, p.sequences.count + 1) {
    int64_t *first = first_.part(0), found = 0;
    for (int64_t s = 0; s < p.sequences.count; ++s) {
      first[s] = found;
      found += ceil_divide(p.sequences.size(s), p.chunk);
      if (found - first[s] > longest_) longest_ = found - first[s];
    }
    first[p.sequences.count] = found;
  }
  int64_t count() const { return first_.part(0)[p_.sequences.count]; }
  int64_t count(int64_t sequence) const { return first_.part(0)[sequence + 1] - first_.part(0)[sequence]; }
  int64_t longest() const { return longest_; }
  Chunk chunk(int64_t sequence, int64_t index) const {
    const int64_t begin = index * p_.chunk, left = p_.sequences.size(sequence) - begin;
    return {sequence, index, p_.sequences.entry(sequence), p_.sequences.start(sequence) + begin,
            left < p_.chunk ? left : p_.chunk, first_.part(0)[sequence] + index, index + 1 == count(sequence)};
  }
  Chunk at(int64_t slot) const {
    const int64_t *first = first_.part(0);
    int64_t low = 0, high = p_.sequences.count;  // first[low] <= slot < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first[middle] <= slot) low = middle;
      else high = middle;
    }
    return chunk(low, slot - first[low]);
  }

 private:
  const LinearRecurrence &p_;
  Scratch<int64_t> first_;
  int64_t longest_ = 0;
};

template <typename S>
MAMBAKIT_INLINE const S *of_step(const void *values, const LinearRecurrence &p, int64_t entry, int64_t time,
                                 int64_t head) {
  return static_cast<const S *>(values) + (entry * p.sequences.length + time) * p.heads + head;
}

template <typename S>
struct Weights {
  S *decay;                             // E (rows, row_columns)
  S *start, *end, *scale, *own, *step;  // (rows): step is a_t
  int64_t stride;

  Weights(Arena<S> &arena, const Sizes<S> &z) : stride(z.row_columns) {
    decay = arena.take(z.rows * stride);
    start = arena.take(stride);
    end = arena.take(stride);
    scale = arena.take(stride);
    own = arena.take(stride);
    step = arena.take(stride);
  }

  void fill_in(const LinearRecurrence &p, const Chunk &c, int64_t head) {
    const int64_t rank = p.rank, rows = c.steps * rank;
    S from_start = S(1);
    for (int64_t i = 0; i < c.steps; ++i) {
      const S a = std::exp(*of_step<S>(p.log_decay, p, c.entry, c.start + i, head));
      const S entering = *of_step<S>(p.scale, p, c.entry, c.start + i, head);
      from_start *= a;
      for (int64_t row = i * rank; row < (i + 1) * rank; ++row) {
        start[row] = from_start;
        scale[row] = entering;
        own[row] = p.own ? *of_step<S>(p.own, p, c.entry, c.start + i, head) : entering;
        step[row] = a;
        S *e = decay + row * stride;
        const S *before = decay + (i - 1) * rank * stride;
        for (int64_t j = 0; j < i * rank; ++j) e[j] = before[j] * a;
        for (int64_t j = i * rank; j < (i + 1) * rank; ++j) e[j] = S(1);
        for (int64_t j = (i + 1) * rank; j < stride; ++j) e[j] = S(0);
      }
    }
    const S *to_last = decay + (rows - 1) * stride;
    for (int64_t j = 0; j < stride; ++j) end[j] = to_last[j];
    for (int64_t j = rows; j < stride; ++j) start[j] = scale[j] = own[j] = step[j] = S(0);
  }
  S whole(int64_t rows) const { return start[rows - 1]; }
};

// Which rows of a chunk a block of rows or columns has to do with: those of its own steps, and earlier or later ones.
struct Causal {
  int64_t rank, rows;
  int64_t begin_of_step(int64_t row) const { return row / rank * rank; }
  int64_t end_of_step(int64_t end_row) const {
    const int64_t end = ceil_divide(end_row, rank) * rank;
    return end < rows ? end : rows;
  }
};

// mixed_tj = scores_tj W_tj (rows, row_columns), scores_tj = q_t . k_j.
template <typename S>
void weigh(const Weights<S> &w, int64_t rank, int64_t rows, const S *scores, S *mixed) {
  const int64_t stride = w.stride;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t begin = t / rank * rank, end = begin + rank;
    const S *e = w.decay + t * stride, *score = scores + t * stride;
    S *m = mixed + t * stride;
    for (int64_t j = 0; j < begin; ++j) m[j] = score[j] * (e[j] * w.scale[j]);
    for (int64_t j = begin; j < end; ++j) m[j] = score[j] * w.own[j];
    for (int64_t j = end; j < stride; ++j) m[j] = S(0);
  }
}

// What stands between the state and y for one head, padded to whole vectors; ones where absent.
template <typename S>
struct HeadWeights {
  S *D;                  // (channels)
  S *up, *gate, *down;   // (rank, channels)

  HeadWeights(Arena<S> &arena, const Sizes<S> &z) {
    D = arena.take(z.channels);
    up = arena.take(z.rank * z.channels);
    gate = arena.take(z.rank * z.channels);
    down = arena.take(z.rank * z.channels);
  }
  void read(const LinearRecurrence &p, const Sizes<S> &z, int64_t head) {
    read_rows(p.D, 1, z, head, S(0), D);
    read_rows(p.up, z.rank, z, head, S(1), up);
    read_rows(p.gate, z.rank, z, head, S(1), gate);
    read_rows(p.down, z.rank, z, head, S(1), down);
  }

 private:
  static void read_rows(const void *from, int64_t rank, const Sizes<S> &z, int64_t head, S absent, S *to) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t c = 0; c < z.channels; ++c)
        to[r * z.channels + c] =
            c >= z.headdim ? S(0)
            : from         ? static_cast<const S *>(from)[(head * rank + r) * z.headdim + c]
                           : absent;
  }
};

// v (rows, channels) of a chunk: x for every rank, times `up`.
template <typename T, typename S>
void read_values(const LinearRecurrence &p, const Sizes<S> &z, const Chunk &c, int64_t head, const HeadWeights<S> &h,
                 S *v) {
  for (int64_t i = 0; i < c.steps; ++i) {
    S *first = v + i * z.rank * z.channels;
    const T *x = row_of<const T>(p.x, c.entry, c.start + i, 0, head);
    read_row(x, int(z.headdim), int(z.channels), first + (z.rank - 1) * z.channels);
    if (!p.up && z.rank == 1) continue;
    const S *last = first + (z.rank - 1) * z.channels;
    for (int64_t r = 0; r < z.rank; ++r)
      for (int64_t j = 0; j < z.channels; ++j) first[r * z.channels + j] = last[j] * h.up[r * z.channels + j];
  }
}

// out = in, rows * columns of them, each row `scale` times what it was.
template <typename S>
void scale_rows(const S *in, int64_t rows, int64_t columns, const S *scale, S *out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += lanes<S>)
      store(out + i * columns + j, load(in + i * columns + j) * fill(scale[i]));
}

// States of a head between (headdim, state) in memory and (headdim, columns) here. `ordered`: whether those in memory
// have their coordinates in the caller's order; what only kernels read is left in theirs where that has as many.
template <typename S>
S *states_of(void *states, const LinearRecurrence &p, int64_t slot, int64_t head) {
  return static_cast<S *>(states) + (slot * p.heads + head) * p.headdim * p.state;
}
template <typename S>
bool lies_alike(const LinearRecurrence &p, const Sizes<S> &z, bool ordered) {
  return z.columns == z.state && (!ordered || p.pairs == 0);
}
template <typename S>
void read_states(const LinearRecurrence &p, const Sizes<S> &z, const void *from, int64_t slot, int64_t head,
                 bool ordered, S *h) {
  if (from && lies_alike(p, z, ordered)) {
    std::memcpy(h, states_of<S>(const_cast<void *>(from), p, slot, head), size_t(z.headdim * z.state) * sizeof(S));
    return;
  }
  for (int64_t i = 0; i < z.headdim * z.columns; ++i) h[i] = S(0);
  if (!from) return;
  const S *memory = states_of<S>(const_cast<void *>(from), p, slot, head);
  for (int64_t c = 0; c < z.headdim; ++c)
    for (int64_t n = 0; n < z.state; ++n) h[c * z.columns + z.place(n, p.interleaved)] = memory[c * z.state + n];
}
template <typename S>
void write_states(const LinearRecurrence &p, const Sizes<S> &z, const S *h, int64_t slot, int64_t head, bool ordered,
                  void *to) {
  S *memory = states_of<S>(to, p, slot, head);
  if (lies_alike(p, z, ordered)) {
    std::memcpy(memory, h, size_t(z.headdim * z.state) * sizeof(S));
    return;
  }
  for (int64_t c = 0; c < z.headdim; ++c)
    for (int64_t n = 0; n < z.state; ++n) memory[c * z.state + n] = h[c * z.columns + z.place(n, p.interleaved)];
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
