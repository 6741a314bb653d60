// The backward of native/linear_recurrence.cpp, from the states kept before every chunk.
//
// With S the state before a chunk, dS the gradient of the one after it, and mixed = scores W (recurrence_chunk.hpp):
//
//     dmixed = dy v^T,   dscores = dmixed W
//     dv  = mixed^T dy + (end scale) k dS^T
//     dk  = dscores^T q + (end scale v) dS
//     dq  = dscores k + (start dy) S
//     dS' = start_last dS + (start dy)^T q          of the state before the chunk
//
// dS alone follows time. So a few chunks at a time, first each head runs through them for its dS, then the chunks are
// independent: a task takes one chunk of a group, whose heads' gradients of B and C it sums.
#include "recurrence_gradients.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

constexpr int64_t tasks_of_a_thread = 4;

template <typename S>
struct Work {
  S *h, *v, *turned_v, *scaled, *dy, *y, *dv, *turned_dv, *mixed, *dmixed, *scores, *dscores;
  S *turned_k, *turned_q, *dk, *dq, *dB, *dC, *from_start, *row;
  Weights<S> weights;
  WeightGradients<S> weight_gradients;
  HeadWeights<S> head;
  TurnedKeys<S> own_keys;
  int64_t size;

  Work(Arena<S> arena, const LinearRecurrence &p, const Sizes<S> &z)
      : h(arena.take(z.headdim * z.columns)), v(arena.take(z.rows * z.channels)),
        turned_v(arena.take(z.channels * z.row_columns)), scaled(arena.take(z.rows * z.channels)),
        dy(arena.take(z.rows * z.channels)), y(arena.take(z.row_columns * z.channels)),
        dv(arena.take(z.row_columns * z.channels)), turned_dv(arena.take(z.headdim * z.row_columns)),
        mixed(arena.take(z.rows * z.row_columns)), dmixed(arena.take(z.rows * z.row_columns)),
        scores(arena.take(z.rows * z.row_columns)), dscores(arena.take(z.rows * z.row_columns)),
        turned_k(arena.take(z.columns * z.row_columns)), turned_q(arena.take(z.columns * z.row_columns)),
        dk(arena.take(z.rows * z.columns)), dq(arena.take(z.rows * z.columns)), dB(arena.take(z.rows * z.columns)),
        dC(arena.take(z.rows * z.columns)), from_start(arena.take(z.row_columns)),
        row(arena.take((z.rank + 3) * z.channels)), weights(arena, z), weight_gradients(arena, z), head(arena, z),
        own_keys(arena, p, z), size(arena.used()) {}
};

template <typename T, typename S>
class Backward {
 public:
  explicit Backward(const LinearRecurrenceBackward &b)
      : b_(b), p_(b.forward), z_(p_), chunks_(p_), spread_(p_, z_), own_keys_(TurnedKeys<S>::needed(p_)),
        block_(chunks_of_a_block()), carry_(p_.sequences.count * z_.heads, z_.headdim * z_.columns),
        states_(p_.sequences.count * block_ * z_.heads, z_.headdim * z_.columns),
        angles_(p_.pairs ? chunks_.count() * z_.heads : 0, z_.half), running_angles_(p_.threads, z_.half),
        dangles_(p_.pairs ? p_.sequences.batch * p_.sequences.length : 0, z_.heads * z_.half),
        sums_(chunks_.count() * z_.heads, Sums<S>(nullptr, p_, z_).size),
        work_(p_.threads, Work<S>(Arena<S>(nullptr), p_, z_).size) {}

  void run() {
    spread_.template fill_in<T>(p_);
    sums_.clear();
    over_heads([this](int64_t sequence, int64_t head) { start(sequence, head); });
    for (int64_t end = chunks_.longest(); end > 0; end -= block_) {
      const int64_t begin = end > block_ ? end - block_ : 0;
      over_heads([=](int64_t sequence, int64_t head) { carry_back(sequence, head, begin, end); });
      const int64_t tasks = p_.sequences.count * (end - begin) * z_.groups;
#pragma omp parallel for num_threads(p_.threads) schedule(dynamic)
      for (int64_t i = 0; i < tasks; ++i) {
        const int64_t sequence = i / z_.groups / (end - begin), index = begin + i / z_.groups % (end - begin);
        if (index < chunks_.count(sequence)) chunk_of_group(chunks_.chunk(sequence, index), i % z_.groups, begin);
      }
    }
    over_heads([this](int64_t sequence, int64_t head) { finish(sequence, head); });
#pragma omp parallel for num_threads(p_.threads) schedule(static)
    for (int64_t head = 0; head < z_.heads; ++head) add_up(head);
    if (p_.pairs) speed_gradients();
  }

 private:
  int64_t chunks_of_a_block() const {
    const int64_t of_one = p_.sequences.count * z_.groups, wanted = tasks_of_a_thread * p_.threads;
    const int64_t found = of_one ? ceil_divide(wanted, of_one) : 1;
    return found < chunks_.longest() ? found : chunks_.longest() > 0 ? chunks_.longest() : 1;
  }

  template <typename Function>
  void over_heads(const Function &function) {
#pragma omp parallel for num_threads(p_.threads) schedule(dynamic)
    for (int64_t i = 0; i < p_.sequences.count * z_.heads; ++i) function(i / z_.heads, i % z_.heads);
  }

  S *carry(int64_t sequence, int64_t head) const { return carry_.part(sequence * z_.heads + head); }
  S *state_after(const Chunk &c, int64_t head, int64_t begin) const {
    return states_.part((c.sequence * block_ + c.chunk - begin) * z_.heads + head);
  }
  const double *angles_before(const Chunk &c, int64_t head) const { return angles_.part(c.slot * z_.heads + head); }

  // The gradient of the final state, and the angles before every chunk.
  void start(int64_t sequence, int64_t head) const {
    read_states(p_, z_, b_.grad_final_state, sequence, head, true, carry(sequence, head));
    if (!p_.pairs) return;
    double *angle = running_angles_.mine();
    first_angles(p_, z_, sequence, head, angle);
    for (int64_t index = 0; index < chunks_.count(sequence); ++index) {
      const Chunk c = chunks_.chunk(sequence, index);
      std::memcpy(angles_.part(c.slot * z_.heads + head), angle, size_t(z_.half) * sizeof(double));
      for (int64_t i = 0; i < c.steps; ++i) turn_on<S>(p_, c.entry, c.start + i, head, angle);
    }
  }

  // Keys of a head in a chunk, which has room for its own in `w`.
  Keys<S> keys_of(const Chunk &c, int64_t head, Work<S> &w) const {
    if (!own_keys_) return shared_keys(spread_, c, head / (z_.heads / z_.groups));
    double *angle = running_angles_.mine();
    if (p_.pairs) std::memcpy(angle, angles_before(c, head), size_t(z_.half) * sizeof(double));
    w.own_keys.read_biases(p_, z_, head);
    return w.own_keys.turn(p_, z_, spread_, c, head, angle);
  }

  // dS after each chunk of [begin, end), last first.
  void carry_back(int64_t sequence, int64_t head, int64_t begin, int64_t end) const {
    Work<S> w(Arena<S>(work_.mine()), p_, z_);
    w.head.read(p_, z_, head);
    S *state = carry(sequence, head);
    const int64_t count = chunks_.count(sequence);
    for (int64_t index = (end < count ? end : count) - 1; index >= begin; --index) {
      const Chunk c = chunks_.chunk(sequence, index);
      const int64_t rows = c.steps * z_.rank;
      std::memcpy(state_after(c, head, begin), state, size_t(z_.headdim * z_.columns) * sizeof(S));
      const Keys<S> keys = keys_of(c, head, w);
      S whole = S(1);
      for (int64_t i = 0; i < c.steps; ++i) {
        whole *= std::exp(*of_step<S>(p_.log_decay, p_, c.entry, c.start + i, head));
        for (int64_t r = 0; r < z_.rank; ++r) w.from_start[i * z_.rank + r] = whole;
      }
      read_output_gradients<T>(p_, b_.grad_y, z_, c, head, w.head, w.dy, w.row);
      scale_rows(w.dy, rows, z_.channels, w.from_start, w.dy);
      multiply(z_.headdim, z_.columns, rows, Factor<S>{w.dy, 1, z_.channels}, keys.q, keys.stride,
               Result<S>{state, z_.columns, Into::scaled, whole});
    }
  }

  // Every gradient of a chunk's steps, for the heads of a group.
  void chunk_of_group(const Chunk &c, int64_t group, int64_t begin) const {
    Work<S> w(Arena<S>(work_.mine()), p_, z_);
    const int64_t share = z_.heads / z_.groups, rows = c.steps * z_.rank;
    const bool needs_y = p_.z.data || p_.down;
    Keys<S> keys = shared_keys(spread_, c, group);
    for (int64_t i = 0; i < rows * z_.columns; ++i) w.dB[i] = w.dC[i] = S(0);
    for (int64_t i = 0; i < rows * z_.row_columns; ++i) w.dscores[i] = S(0);
    for (int64_t head = group * share; head < (group + 1) * share; ++head) {
      w.head.read(p_, z_, head);
      if (own_keys_ || head == group * share) {
        keys = keys_of(c, head, w);
        score(z_, c, keys, w.turned_k, w.scores);
        if (needs_y) transpose(keys.q, keys.stride, rows, z_.columns, w.turned_q, z_.row_columns);
      }
      head_of_chunk(c, head, keys, state_after(c, head, begin), w);
    }
    if (!own_keys_) through_scores(rows, keys, w.dscores, w.dB, w.dC, Into::sum);
    write_key_gradients(c, group, w.dB, b_.grad_B);
    write_key_gradients(c, group, w.dC, b_.grad_C);
  }

  void head_of_chunk(const Chunk &c, int64_t head, const Keys<S> &keys, const S *state_gradient, Work<S> &w) const {
    const int64_t rows = c.steps * z_.rank, K = z_.channels, L = z_.row_columns, N = z_.columns;
    const int64_t used = whole_vectors<S>(rows);
    const Causal causal{z_.rank, rows};
    const Sums<S> sums(sums_.part(c.slot * z_.heads + head), p_, z_);
    read_values<T>(p_, z_, c, head, w.head, w.v);
    read_output_gradients<T>(p_, b_.grad_y, z_, c, head, w.head, w.dy, w.row);
    read_states(p_, z_, p_.kept, c.slot, head, false, w.h);
    w.weights.fill_in(p_, c, head);
    weigh(w.weights, z_.rank, rows, w.scores, w.mixed);
    if (p_.z.data || p_.down) {
      outputs_of_chunk(z_, rows, w.weights, w.h, w.turned_q, w.mixed, w.v, w.head.D, w.turned_dv, w.y);
      gate_gradients<T>(b_, z_, c, head, w.head, w.y, sums, w.row);
    }

    transpose(w.v, K, rows, K, w.turned_v, L);
    multiply(rows, used, Factor<S>{w.dy, K, 1}, w.turned_v, L, Result<S>{w.dmixed, L, Into::fresh, S(1)},
             [causal, K](int64_t, int64_t end_row, int64_t column, int64_t) {
               return Range{0, causal.begin_of_step(column) < causal.end_of_step(end_row) ? K : 0};
             });
    weigh_backward(w.weights, z_.rank, rows, w.scores, w.dmixed, w.weight_gradients);

    // Out of the state before the chunk.
    scale_rows(w.dy, rows, K, w.weights.start, w.scaled);
    multiply(rows, N, z_.headdim, Factor<S>{w.scaled, K, 1}, w.h, N, Result<S>{w.dq, N, Into::fresh, S(1)});
    for (int64_t t = 0; t < rows; ++t) w.from_start[t] = dot(w.dq + t * N, keys.q + t * keys.stride, N);
    const S across = w.weights.whole(rows) * dot(w.h, state_gradient, z_.headdim * N);

    // Into the state after it.
    multiply(z_.headdim, used, N, Factor<S>{state_gradient, N, 1}, w.turned_k, L,
             Result<S>{w.turned_dv, L, Into::fresh, S(1)});
    state_weight_gradients(b_, z_, c, head, w.weights, w.turned_v, w.turned_dv, w.from_start, across,
                           w.weight_gradients);
    for (int64_t j = 0; j < rows; ++j) w.from_start[j] = w.weights.end[j] * w.weights.scale[j];
    scale_rows(w.v, rows, K, w.from_start, w.scaled);
    multiply(rows, N, z_.headdim, Factor<S>{w.scaled, K, 1}, state_gradient, N,
             Result<S>{own_keys_ ? w.dk : w.dB, N, own_keys_ ? Into::fresh : Into::sum, S(1)});

    multiply(z_.headdim, used, Factor<S>{w.dy, 1, K}, w.mixed, L, Result<S>{w.turned_dv, L, Into::sum, S(1)},
             [causal](int64_t, int64_t, int64_t column, int64_t) {
               return Range{causal.begin_of_step(column), causal.rows};
             });
    transpose(w.turned_dv, L, z_.headdim, used, w.dv, K);
    value_gradients<T>(b_, z_, c, head, w.head, w.dy, w.v, w.dv, sums, w.row);

    if (own_keys_) {
      through_scores(rows, keys, w.dmixed, w.dk, w.dq, Into::sum);
      S *dangle = p_.pairs ? dangles_.part(c.entry * p_.sequences.length + c.start) + head * z_.half : nullptr;
      turn_back(z_, c, w.own_keys, w.dk, w.dq, w.dB, w.dC, sums, dangle, p_.pairs ? step_of_dangles() : 0);
    } else {
      for (int64_t i = 0; i < rows * N; i += lanes<S>) store(w.dC + i, load(w.dC + i) + load(w.dq + i));
      for (int64_t i = 0; i < rows * L; i += lanes<S>) store(w.dscores + i, load(w.dscores + i) + load(w.dmixed + i));
    }
  }

  // dk += dscores^T q, dq += dscores k.
  void through_scores(int64_t rows, const Keys<S> &keys, const S *dscores, S *dk, S *dq, Into into) const {
    const Causal causal{z_.rank, rows};
    const int64_t N = z_.columns, L = z_.row_columns;
    multiply(rows, N, Factor<S>{dscores, L, 1}, keys.k, keys.stride, Result<S>{dq, N, into, S(1)},
             [causal](int64_t, int64_t end_row, int64_t, int64_t) { return Range{0, causal.end_of_step(end_row)}; });
    multiply(rows, N, Factor<S>{dscores, 1, L}, keys.q, keys.stride, Result<S>{dk, N, into, S(1)},
             [causal](int64_t row, int64_t, int64_t, int64_t) {
               return Range{causal.begin_of_step(row), causal.rows};
             });
  }

  void write_key_gradients(const Chunk &c, int64_t group, const S *rows, const Rows &to) const {
    for (int64_t i = 0; i < c.steps; ++i)
      for (int64_t r = 0; r < z_.rank; ++r) {
        const S *row = rows + (i * z_.rank + r) * z_.columns;
        T *target = row_of<T>(to, c.entry, c.start + i, r, group);
        if (p_.pairs == 0) write_row(row, int(z_.state), target);
        else
          for (int64_t n = 0; n < z_.state; ++n) target[n] = narrow<T>(row[z_.place(n, p_.interleaved)]);
      }
  }

  // The gradient of the initial state; those of a step's angles summed over all later ones, which it turned too.
  void finish(int64_t sequence, int64_t head) const {
    if (b_.grad_initial_state) write_states(p_, z_, carry(sequence, head), sequence, head, true, b_.grad_initial_state);
    if (!p_.pairs) return;
    const int64_t entry = p_.sequences.entry(sequence), start = p_.sequences.start(sequence);
    double *sum = running_angles_.mine();
    for (int64_t i = 0; i < z_.half; ++i) sum[i] = 0.0;
    for (int64_t t = start + p_.sequences.size(sequence) - 1; t >= start; --t) {
      S *dangle = dangles_.part(entry * p_.sequences.length + t) + head * z_.half, along = S(0);
      const S *speed = speeds_of<S>(p_, entry, t, head);
      for (int64_t i = 0; i < z_.pairs; ++i) {
        sum[i] += double(dangle[i]);
        dangle[i] = S(sum[i]);
        along += dangle[i] * speed[i];
      }
      *const_cast<S *>(of_step<S>(b_.grad_steps, p_, entry, t, head)) = along;
    }
    S *initial = static_cast<S *>(b_.grad_initial_angle);
    for (int64_t i = 0; initial && i < z_.pairs; ++i) initial[(sequence * z_.heads + head) * z_.pairs + i] = S(sum[i]);
  }

  void speed_gradients() const {
    const int64_t length = p_.sequences.length, rows = p_.sequences.batch * length;
    const bool shared = p_.speeds.group_stride == 0;
#pragma omp parallel for num_threads(p_.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t head = 0; head < z_.heads; ++head) {
        const S step = *of_step<S>(p_.steps, p_, row / length, row % length, head);
        const S *dangle = dangles_.part(row) + head * z_.half;
        S *to = row_of<S>(b_.grad_speeds, row / length, row % length, 0, shared ? 0 : head);
        for (int64_t i = 0; i < z_.pairs; ++i)
          to[i] = step * dangle[i] + (shared && head > 0 ? to[i] : S(0));
      }
  }

  int64_t step_of_dangles() const { return dangles_.part(1) - dangles_.part(0); }

  void add_up(int64_t head) const {
    const auto each = [&](auto member, void *target, int64_t rank, int64_t size, int64_t stride, bool placed) {
      S *to = static_cast<S *>(target);
      if (!to) return;
      to += head * rank * size;
      for (int64_t i = 0; i < rank * size; ++i) to[i] = S(0);
      for (int64_t slot = 0; slot < chunks_.count(); ++slot) {
        const S *from = Sums<S>(sums_.part(slot * z_.heads + head), p_, z_).*member;
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t i = 0; i < size; ++i)
            to[r * size + i] += from[r * stride + (placed ? z_.place(i, p_.interleaved) : i)];
      }
    };
    each(&Sums<S>::D, b_.grad_D, 1, z_.headdim, z_.channels, false);
    each(&Sums<S>::up, b_.grad_up, z_.rank, z_.headdim, z_.channels, false);
    each(&Sums<S>::gate, b_.grad_gate, z_.rank, z_.headdim, z_.channels, false);
    each(&Sums<S>::down, b_.grad_down, z_.rank, z_.headdim, z_.channels, false);
    each(&Sums<S>::B_bias, b_.grad_B_bias, z_.rank, z_.state, z_.columns, true);
    each(&Sums<S>::C_bias, b_.grad_C_bias, z_.rank, z_.state, z_.columns, true);
  }

  const LinearRecurrenceBackward &b_;
  const LinearRecurrence &p_;
  const Sizes<S> z_;
  const Chunks chunks_;
  const SpreadKeys<S> spread_;
  const bool own_keys_;
  const int64_t block_;
  const Scratch<S> carry_, states_;
  const Scratch<double> angles_, running_angles_;
  const Scratch<S> dangles_, sums_, work_;
};

}  // namespace

void linear_recurrence_backward(const LinearRecurrenceBackward &b) {
  switch (b.forward.dtype) {
    case Dtype::float32: return Backward<float, float>(b).run();
    case Dtype::float64: return Backward<double, double>(b).run();
    case Dtype::bfloat16: return Backward<bfloat16, float>(b).run();
    case Dtype::float16: return Backward<float16, float>(b).run();
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
