// How many threads a step gets.
//
// Threads that wait for one another at a barrier lose a whole slice of the scheduler's time, some milliseconds,
// whenever another process has taken the place of one of them: a hundred times what a small step takes. And waking
// threads that have gone to sleep between two ticks can take longer than the tick. So a step that several threads did
// not make faster than one does is followed by some with one. Of steps that take milliseconds, as a language model's do,
// only a few: they lose less by waiting, and more by going alone.
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
    if (weight_bytes > bytes_of_a_long_step && longest_ == longest_pause) {
      shortest_ = pause_ = alone_ = 1;
      longest_ = longest_pause_of_long_steps;
    }
    if (most == 1 || alone_ == 0) return most;
    --alone_;
    return 1;
  }

  // Learns from the time that a step took with `threads`.
  void took(std::chrono::duration<double> time, int threads) {
    if (threads == 1) {
      alone_time_ = alone_time_.count() == 0 ? time : 0.9 * alone_time_ + 0.1 * time;
    } else if (time > alone_time_) {
      alone_ = pause_;
      if (pause_ < longest_) pause_ *= 2;
    } else if (pause_ > shortest_) {
      pause_ /= 2;
    }
  }

 private:
  // Reading this much takes a thread longer than the barriers that another thread would cost.
  static constexpr int64_t bytes_of_a_thread = 3 << 18;
  static constexpr int64_t bytes_of_a_long_step = 32 << 20;
  static constexpr int64_t shortest_pause = 16, longest_pause = 4096, longest_pause_of_long_steps = 32;  // steps

  int64_t shortest_ = shortest_pause, longest_ = longest_pause;
  int64_t alone_ = shortest_pause, pause_ = shortest_pause;  // the first steps show how long one thread takes
  std::chrono::duration<double> alone_time_{0};
};

}  // namespace mambakit
