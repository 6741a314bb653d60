// The recurrence behind Mamba-2 and Mamba-3: a matrix of state for each head, decaying at one rate.
//
//     s_t = a_t s_{t-1} + scale_t sum_r v_tr k_tr^T
//     y_tr = a_t s_{t-1} q_tr + own_t sum_r' (k_tr' . q_tr) v_tr' + D v_tr
//
// ops/reference/ssd.py (own = scale, rank 1) and ops/reference/mamba3_scan.py are the definitions. Time is cut into
// chunks that fit the caches, and a chunk is matrix products: with S the state before it, and the weights of
// recurrence_chunk.hpp,
//
//     y  = start (q S^T) + ((q k^T) W) v
//     S' = start_last S + (end scale v)^T k
//
// A task takes one head through time. What depends on keys alone is formed once for all heads that share them.
#include "recurrence_outputs.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

// q^T and the scores of every chunk and group, where the heads of a group share them.
template <typename S>
struct SharedScores {
  SharedScores(const Sizes<S> &z, const Chunks &chunks, bool any)
      : count(any ? chunks.count() * z.groups : 0), memory(count, (z.columns + z.rows) * z.row_columns) {}
  void fill_in(const LinearRecurrence &p, const Sizes<S> &z, const Chunks &chunks, const SpreadKeys<S> &spread) const {
    Scratch<S> turned(p.threads, z.columns * z.row_columns);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Chunk c = chunks.at(i / z.groups);
      const Keys<S> keys = shared_keys(spread, c, i % z.groups);
      transpose(keys.q, keys.stride, c.steps * z.rank, z.columns, memory.part(i), z.row_columns);
      score(z, c, keys, turned.mine(), memory.part(i) + z.columns * z.row_columns);
    }
  }
  int64_t count;
  Scratch<S> memory;
};

template <typename S>
struct Work {
  S *h, *v, *scaled, *y, *from_state, *mixed, *turned, *scores, *row;
  Weights<S> weights;
  HeadWeights<S> head;
  TurnedKeys<S> own_keys;
  int64_t size;

  Work(Arena<S> arena, const LinearRecurrence &p, const Sizes<S> &z)
      : h(arena.take(z.headdim * z.columns)), v(arena.take(z.rows * z.channels)),
        scaled(arena.take(z.rows * z.channels)), y(arena.take(z.row_columns * z.channels)),
        from_state(arena.take(z.headdim * z.row_columns)), mixed(arena.take(z.rows * z.row_columns)),
        turned(arena.take(z.columns * z.row_columns)), scores(arena.take(z.rows * z.row_columns)),
        row(arena.take((z.rank + 1) * z.channels)), weights(arena, z), head(arena, z), own_keys(arena, p, z),
        size(arena.used()) {}
};

template <typename T, typename S>
void run_head(const LinearRecurrence &p, const Sizes<S> &z, const Chunks &chunks, const SpreadKeys<S> &spread,
              const SharedScores<S> &shared, int64_t sequence, int64_t head, Work<S> &w, double *angle) {
  const bool own_keys = TurnedKeys<S>::needed(p);
  const int64_t group = head / (z.heads / z.groups);
  w.head.read(p, z, head);
  if (own_keys) w.own_keys.read_biases(p, z, head);
  first_angles(p, z, sequence, head, angle);
  read_states(p, z, p.initial_state, sequence, head, true, w.h);
  for (int64_t index = 0; index < chunks.count(sequence); ++index) {
    const Chunk c = chunks.chunk(sequence, index);
    const int64_t rows = c.steps * z.rank;
    if (p.kept) write_states(p, z, w.h, c.slot, head, false, p.kept);
    Keys<S> keys;
    const S *turned_q = w.turned, *scores = w.scores;
    if (own_keys) {
      keys = w.own_keys.turn(p, z, spread, c, head, angle);
      score(z, c, keys, w.turned, w.scores);
      transpose(keys.q, keys.stride, rows, z.columns, w.turned, z.row_columns);
    } else {
      keys = shared_keys(spread, c, group);
      turned_q = shared.memory.part(c.slot * z.groups + group);
      scores = turned_q + z.columns * z.row_columns;
    }
    read_values<T>(p, z, c, head, w.head, w.v);
    w.weights.fill_in(p, c, head);
    weigh(w.weights, z.rank, rows, scores, w.mixed);
    outputs_of_chunk(z, rows, w.weights, w.h, turned_q, w.mixed, w.v, w.head.D, w.from_state, w.y);
    write_outputs<T>(p, z, c, head, w.head, w.y, w.row);
    advance_state(z, rows, w.weights, keys, w.v, w.scaled, w.h);
  }
  write_states(p, z, w.h, sequence, head, true, p.final_state);
}

template <typename T, typename S>
void run(const LinearRecurrence &p) {
  const Sizes<S> z(p);
  const Chunks chunks(p);
  const SpreadKeys<S> spread(p, z);
  spread.template fill_in<T>(p);
  const SharedScores<S> shared(z, chunks, !TurnedKeys<S>::needed(p));
  shared.fill_in(p, z, chunks, spread);
  const Scratch<S> memory(p.threads, Work<S>(Arena<S>(nullptr), p, z).size);
  const Scratch<double> angles(p.threads, z.half);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t i = 0; i < p.sequences.count * z.heads; ++i) {
    Work<S> work(Arena<S>(memory.mine()), p, z);
    run_head<T, S>(p, z, chunks, spread, shared, i / z.heads, i % z.heads, work, angles.mine());
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
