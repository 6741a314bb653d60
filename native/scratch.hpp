// Working memory of a kernel, taken before its threads start so that running out of it is an ordinary exception.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mambakit {
namespace MAMBAKIT_ISA {

template <typename S>
class Scratch {
 public:
  Scratch(int64_t parts, int64_t part_size)
      : parts_(parts), stride_((part_size + line - 1) / line * line),
        memory_(static_cast<S *>(::operator new(size_t(parts * stride_) * sizeof(S), alignment))) {}
  ~Scratch() { ::operator delete(memory_, alignment); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  S *part(int64_t index) const { return memory_ + index * stride_; }
  S *mine() const {
#ifdef _OPENMP
    return part(omp_get_thread_num());
#else
    return part(0);
#endif
  }
  void clear() const { std::memset(memory_, 0, size_t(parts_ * stride_) * sizeof(S)); }

 private:
  static constexpr std::align_val_t alignment{64};
  static constexpr int64_t line = 64 / int64_t(sizeof(S));
  int64_t parts_, stride_;
  S *memory_;
};

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
