// Causal depthwise convolution, forward and backward: ops/reference/causal_conv1d.py is the definition.
//
// Rows are streamed whole, all channels of a step at a time; a task is a span of steps of one sequence. The spans do
// not depend on the number of threads, and neither does the order in which weight gradients are summed.
#include "rows.hpp"
#include "scratch.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {
namespace {

constexpr int64_t span_size = 128;  // steps of a task

int64_t padded(int64_t channels) { return ceil_divide(channels, 64) * 64; }

// The tasks: sequence s owns the spans [first(s), first(s + 1)), of which the longest is span_size steps.
struct Span {
  int64_t sequence, begin, end;
};
int64_t span_count(const Sequences &sequences) {
  int64_t total = 0;
  for (int64_t s = 0; s < sequences.count; ++s) total += ceil_divide(sequences.size(s), span_size);
  return total;
}
void list_spans(const Sequences &sequences, Span *spans) {
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t begin = 0; begin < sequences.size(s); begin += span_size) {
      const int64_t end = begin + span_size;
      *spans++ = {s, begin, end < sequences.size(s) ? end : sequences.size(s)};
    }
}

// Input `time` of a sequence, counted from its start; before it, the initial state; zero where there is none.
template <typename T, typename S>
void read_input(const Convolution &p, int64_t s, int64_t time, S *row) {
  const int64_t channels = p.channels, kept = p.width - 1;
  if (time >= 0) {
    read_row(row_of<const T>(p.x, p.sequences.entry(s), p.sequences.start(s) + time), int(channels),
             int(padded(channels)), row);
  } else if (p.initial_state) {
    const T *state = static_cast<const T *>(p.initial_state) + (s * kept + kept + time) * channels;
    read_row(state, int(channels), int(padded(channels)), row);
  } else {
    for (int64_t c = 0; c < padded(channels); ++c) row[c] = S(0);
  }
}

// Weights by tap, (width, padded channels), and the bias behind them.
template <typename S>
void read_weights(const Convolution &p, S *taps) {
  const int64_t stride = padded(p.channels);
  const S *weight = static_cast<const S *>(p.weight), *bias = static_cast<const S *>(p.bias);
  for (int64_t c = 0; c < stride; ++c) {
    const bool inside = c < p.channels;
    for (int64_t k = 0; k < p.width; ++k) taps[k * stride + c] = inside ? weight[c * p.width + k] : S(0);
    taps[p.width * stride + c] = inside && bias ? bias[c] : S(0);
  }
}

// The last `width` inputs, as a ring of rows.
template <typename S>
class Window {
 public:
  Window(S *memory, int64_t width, int64_t stride) : memory_(memory), width_(width), stride_(stride) {}
  S *row(int64_t time) const { return memory_ + ((time % width_ + width_) % width_) * stride_; }

 private:
  S *memory_;
  int64_t width_, stride_;
};

// sum_k taps_k x_{t - (width - 1) + k} + bias for one vector of channels.
template <typename S>
MAMBAKIT_INLINE Vec<S> convolve(const Window<S> &window, const S *taps, int64_t width, int64_t stride, int64_t t,
                                int64_t c) {
  Vec<S> sum = load(taps + width * stride + c);
  for (int64_t k = 0; k < width; ++k)
    sum = sum + load(taps + k * stride + c) * load(window.row(t - (width - 1) + k) + c);
  return sum;
}

template <typename T, typename S>
void write_final_state(const Convolution &p, int64_t s, S *row) {
  const int64_t kept = p.width - 1, size = p.sequences.size(s);
  for (int64_t k = 0; k < kept; ++k) {
    read_input<T>(p, s, size - kept + k, row);
    write_row(row, int(p.channels), static_cast<T *>(p.final_state) + (s * kept + k) * p.channels);
  }
}

template <typename T, typename S>
void forward(const Convolution &p) {
  const int64_t stride = padded(p.channels), tasks = span_count(p.sequences);
  Scratch<Span> spans(1, tasks);
  list_spans(p.sequences, spans.part(0));
  Scratch<S> taps(1, (p.width + 1) * stride), scratch(p.threads, (p.width + 1) * stride);
  read_weights(p, taps.part(0));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    const Span span = spans.part(0)[task];
    const Window<S> window(scratch.mine(), p.width, stride);
    S *y = scratch.mine() + p.width * stride;
    for (int64_t t = span.begin - (p.width - 1); t < span.begin; ++t) read_input<T>(p, span.sequence, t, window.row(t));
    for (int64_t t = span.begin; t < span.end; ++t) {
      read_input<T>(p, span.sequence, t, window.row(t));
      for (int64_t c = 0; c < stride; c += lanes<S>) {
        Vec<S> sum = convolve(window, taps.part(0), p.width, stride, t, c);
        if (p.silu) sum = sum * sigmoid<S>(sum);
        store(y + c, sum);
      }
      write_row(y, int(p.channels),
                row_of<T>(p.y, p.sequences.entry(span.sequence), p.sequences.start(span.sequence) + t));
    }
  }
  for (int64_t s = 0; s < p.sequences.count; ++s) write_final_state<T>(p, s, scratch.part(0));
}

// The gradient of the sum before the activation at step t; zero outside the sequence.
template <typename T, typename S>
void read_sum_gradient(const ConvolutionBackward &q, int64_t s, int64_t t, const Window<S> &window, const S *taps,
                       S *grad) {
  const Convolution &p = q.forward;
  const int64_t stride = padded(p.channels);
  if (t >= p.sequences.size(s)) {
    for (int64_t c = 0; c < stride; ++c) grad[c] = S(0);
    return;
  }
  read_row(row_of<const T>(q.grad_y, p.sequences.entry(s), p.sequences.start(s) + t), int(p.channels), int(stride),
           grad);
  if (!p.silu) return;
  for (int64_t c = 0; c < stride; c += lanes<S>) {
    const Vec<S> sum = convolve(window, taps, p.width, stride, t, c), on = sigmoid<S>(sum);
    store(grad + c, load(grad + c) * on * (fill(S(1)) + sum * (fill(S(1)) - on)));
  }
}

// The gradient of input `time` (negative: of the initial state) from the sums it went into, and from the final state.
template <typename T, typename S>
void input_gradient(const ConvolutionBackward &q, int64_t s, int64_t time, const Window<S> &grads, const S *taps,
                    S *row) {
  const Convolution &p = q.forward;
  const int64_t stride = padded(p.channels), kept = p.width - 1, size = p.sequences.size(s);
  const int64_t place = time - (size - kept);  // in the final state
  if (q.grad_final_state && place >= 0 && place < kept)
    read_row(static_cast<const T *>(q.grad_final_state) + (s * kept + place) * p.channels, int(p.channels),
             int(stride), row);
  else
    for (int64_t c = 0; c < stride; ++c) row[c] = S(0);
  const int64_t first = time < 0 ? -time : 0;  // sums of steps before the first do not exist
  for (int64_t c = 0; c < stride; c += lanes<S>) {
    Vec<S> total = load(row + c);
    for (int64_t d = first; d < p.width; ++d)
      total = total + load(taps + (p.width - 1 - d) * stride + c) * load(grads.row(time + d) + c);
    store(row + c, total);
  }
}

// One span: the gradients of its inputs, and its part of the gradients of weight and bias, (width + 1, stride).
template <typename T, typename S>
void backward_span(const ConvolutionBackward &q, const Span &span, const S *taps, S *memory, S *grad_taps) {
  const Convolution &p = q.forward;
  const int64_t stride = padded(p.channels), width = p.width, s = span.sequence;
  const Window<S> window(memory, width, stride), grads(memory + width * stride, width, stride);
  S *row = memory + 2 * width * stride;
  for (int64_t t = span.begin - (width - 1); t < span.begin; ++t) read_input<T>(p, s, t, window.row(t));
  // Sum t's gradient is in hand for steps up to time + width - 1 when the gradient of input `time` is formed.
  for (int64_t t = span.begin; t < span.end + width - 1; ++t) {
    if (t < p.sequences.size(s)) read_input<T>(p, s, t, window.row(t));
    read_sum_gradient<T>(q, s, t, window, taps, grads.row(t));
    if (t < span.end) {
      const S *grad = grads.row(t);
      for (int64_t c = 0; c < stride; c += lanes<S>) {
        const Vec<S> g = load(grad + c);
        for (int64_t k = 0; k < width; ++k) {
          S *sum = grad_taps + k * stride + c;
          store(sum, load(sum) + g * load(window.row(t - (width - 1) + k) + c));
        }
        S *sum = grad_taps + width * stride + c;
        store(sum, load(sum) + g);
      }
    }
    const int64_t time = t - (width - 1);
    if (time < span.begin) continue;
    input_gradient<T>(q, s, time, grads, taps, row);
    write_row(row, int(p.channels), row_of<T>(q.grad_x, p.sequences.entry(s), p.sequences.start(s) + time));
  }
}

// The gradient of a sequence's initial state, from its first width - 1 sums.
template <typename T, typename S>
void initial_state_gradient(const ConvolutionBackward &q, int64_t s, const S *taps, S *memory) {
  const Convolution &p = q.forward;
  const int64_t stride = padded(p.channels), width = p.width, kept = width - 1;
  const Window<S> window(memory, width, stride), grads(memory + width * stride, width, stride);
  S *row = memory + 2 * width * stride;
  for (int64_t t = -kept; t < 0; ++t) read_input<T>(p, s, t, window.row(t));
  for (int64_t t = 0; t < kept; ++t) {
    if (t < p.sequences.size(s)) read_input<T>(p, s, t, window.row(t));
    read_sum_gradient<T>(q, s, t, window, taps, grads.row(t));
  }
  for (int64_t k = 0; k < kept; ++k) {
    input_gradient<T>(q, s, k - kept, grads, taps, row);
    write_row(row, int(p.channels), static_cast<T *>(q.grad_initial_state) + (s * kept + k) * p.channels);
  }
}

template <typename T, typename S>
void backward(const ConvolutionBackward &q) {
  const Convolution &p = q.forward;
  const int64_t stride = padded(p.channels), tasks = span_count(p.sequences), size = (p.width + 1) * stride;
  // Spans share a fixed number of partial sums, so that memory stays small and the order of summing stays the same.
  const int64_t parts = tasks < 32 ? (tasks > 0 ? tasks : 1) : 32;
  Scratch<Span> spans(1, tasks);
  list_spans(p.sequences, spans.part(0));
  Scratch<S> taps(1, size), scratch(p.threads, (2 * p.width + 1) * stride), partial(parts, size);
  read_weights(p, taps.part(0));
  partial.clear();
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task)
      backward_span<T>(q, spans.part(0)[task], taps.part(0), scratch.mine(), partial.part(part));
  const int64_t initial_states = q.grad_initial_state ? p.sequences.count : 0;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t s = 0; s < initial_states; ++s) initial_state_gradient<T>(q, s, taps.part(0), scratch.mine());

  S *grad_weight = static_cast<S *>(q.grad_weight), *grad_bias = static_cast<S *>(q.grad_bias);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t k = 0; k <= p.width; ++k) {
      S total = S(0);
      for (int64_t part = 0; part < parts; ++part) total += partial.part(part)[k * stride + c];
      if (k < p.width) grad_weight[c * p.width + k] = total;
      else if (grad_bias) grad_bias[c] = total;
    }
}

}  // namespace

void convolution(const Convolution &p) {
  switch (p.dtype) {
    case Dtype::float32: return forward<float, float>(p);
    case Dtype::float64: return forward<double, double>(p);
    case Dtype::bfloat16: return forward<bfloat16, float>(p);
    case Dtype::float16: return forward<float16, float>(p);
  }
}

void convolution_backward(const ConvolutionBackward &q) {
  switch (q.forward.dtype) {
    case Dtype::float32: return backward<float, float>(q);
    case Dtype::float64: return backward<double, double>(q);
    case Dtype::bfloat16: return backward<bfloat16, float>(q);
    case Dtype::float16: return backward<float16, float>(q);
  }
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
