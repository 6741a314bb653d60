// Chooses among the kernels compiled for several instruction sets by asking the processor.
#include "kernels.hpp"

#ifndef MAMBAKIT_HAS_base
#define MAMBAKIT_X86_64
#endif
#if defined(MAMBAKIT_X86_64) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace mambakit {

#define MAMBAKIT_DECLARE(isa)                                        \
  namespace isa {                                                    \
  void scan_forward(const ScanForward &);                            \
  void scan_backward(const ScanBackward &);                          \
  void convolution(const Convolution &);                             \
  void convolution_backward(const ConvolutionBackward &);            \
  void linear_recurrence(const LinearRecurrence &);                  \
  void linear_recurrence_backward(const LinearRecurrenceBackward &); \
  void step(const StackStep &);                                      \
  void product(const MatrixProduct &);                               \
  void dequantise(const Dequantisation &);                           \
  }
#define MAMBAKIT_TABLE(isa) \
  {isa::scan_forward,      isa::scan_backward,              isa::convolution, isa::convolution_backward, \
   isa::linear_recurrence, isa::linear_recurrence_backward, isa::step,        isa::product,                \
   isa::dequantise}

namespace {
struct InstructionSet {
  const char *name;
  bool (*runs)();
  KernelTable table;
};
}  // namespace

#ifdef MAMBAKIT_X86_64
MAMBAKIT_DECLARE(x86_64_v2)
MAMBAKIT_DECLARE(x86_64_v3)
MAMBAKIT_DECLARE(x86_64_v4)

namespace {
#ifdef _MSC_VER
// The operating system must keep the wide registers (XCR0) as well as the processor have the instructions.
bool feature(int leaf, int reg, int bit) {
  int info[4];
  __cpuidex(info, leaf, 0);
  return (info[reg] >> bit) & 1;
}
bool keeps(unsigned long long mask) { return feature(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool runs_v2() { return feature(1, 2, 20); }
bool runs_v3() { return keeps(0x6) && feature(1, 2, 12) && feature(1, 2, 29) && feature(7, 1, 5); }
bool runs_v4() {
  return runs_v3() && keeps(0xe6) && feature(7, 1, 16) && feature(7, 1, 17) && feature(7, 1, 30) && feature(7, 1, 31);
}
#else
bool runs_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool runs_v3() {
  return runs_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
const InstructionSet all[] = {
#ifdef MAMBAKIT_HAS_x86_64_v4
    {"x86-64-v4", runs_v4, MAMBAKIT_TABLE(x86_64_v4)},
#endif
#ifdef MAMBAKIT_HAS_x86_64_v3
    {"x86-64-v3", runs_v3, MAMBAKIT_TABLE(x86_64_v3)},
#endif
#ifdef MAMBAKIT_HAS_x86_64_v2
    {"x86-64-v2", runs_v2, MAMBAKIT_TABLE(x86_64_v2)},
#endif
};
}  // namespace
#else
MAMBAKIT_DECLARE(base)
namespace {
const InstructionSet all[] = {{"base", [] { return true; }, MAMBAKIT_TABLE(base)}};
}
#endif

namespace {
constexpr int compiled = int(sizeof all / sizeof all[0]);
// Every later set runs wherever an earlier one does, so the first that runs starts the list of those that do.
int first_that_runs() {
  int first = 0;
  while (first < compiled && !all[first].runs()) ++first;
  return first;
}
}  // namespace

int instruction_set_count() { return compiled - first_that_runs(); }
const char *instruction_set_name(int index) { return all[first_that_runs() + index].name; }
const KernelTable &kernels(int index) { return all[first_that_runs() + index].table; }

}  // namespace mambakit
