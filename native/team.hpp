// How many threads a step gets.
//
// Threads that wait for one another at a barrier lose a whole slice of the scheduler's time, some milliseconds, whenever
// another process has taken the place of one of them: a hundred times what a small step takes. So a step that took far
// longer with several threads than it does with one is followed by some with one.
#pragma once

#include <chrono>
#include <cstdint>

namespace mambakit {

class Team {
 public:
  // Threads for a step that reads so many bytes of weights; at most `allowed`.
  int size(int64_t weight_bytes, int allowed) {
    const int64_t useful = weight_bytes / bytes_of_a_thread;
    const int most = useful < 1 ? 1 : useful < allowed ? int(useful) : allowed;
    if (most == 1 || alone_ == 0) return most;
    --alone_;
    return 1;
  }

  // Learns from the time that a step took with `threads`.
  void took(std::chrono::duration<double> time, int threads) {
    if (threads == 1) {
      if (time < alone_time_) alone_time_ = time;
    } else if (time > 4 * alone_time_) {
      alone_ = pause_;
      if (pause_ < longest_pause) pause_ *= 2;
    } else if (pause_ > shortest_pause) {
      pause_ /= 2;
    }
  }

 private:
  // Reading this much takes a thread longer than the barriers that another thread would cost.
  static constexpr int64_t bytes_of_a_thread = 2 << 20;
  static constexpr int64_t shortest_pause = 64, longest_pause = 4096;  // steps

  int64_t alone_ = 1, pause_ = shortest_pause;  // the first step is alone: it is what the others are compared with
  std::chrono::duration<double> alone_time_{1e9};
};

}  // namespace mambakit
