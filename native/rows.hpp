// Rows of a tensor: read into and written from arrays of the type that sums are made in.
#pragma once

#include "kernels.hpp"
#include "vector.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

MAMBAKIT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MAMBAKIT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MAMBAKIT_INLINE float widen(float x) { return x; }
MAMBAKIT_INLINE float widen(int8_t x) { return float(x); }
MAMBAKIT_INLINE double widen(double x) { return x; }
MAMBAKIT_INLINE float widen(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
MAMBAKIT_INLINE float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // Shifted into float's fields the exponent is short by 112; multiplying by 2^112 mends it, subnormals too.
  const float finite = float_of(magnitude << 13) * float_of(0x77800000u);
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : bits_of(finite);
  return float_of(bits | sign);
}

// Round to nearest, ties to even.
template <typename T>
T narrow(float x);
template <>
MAMBAKIT_INLINE float narrow<float>(float x) {
  return x;
}
template <>
MAMBAKIT_INLINE bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}
template <>
MAMBAKIT_INLINE float16 narrow<float16>(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // at and above 65520 the nearest is infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal's bits at the bottom
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {uint16_t(half | sign)};
}
template <typename T>
T narrow(double x);
template <>
MAMBAKIT_INLINE double narrow<double>(double x) {
  return x;
}

MAMBAKIT_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The row of one step of a batch's entry, for one rank and group where the tensor has such axes.
template <typename T>
MAMBAKIT_INLINE T *row_of(const Rows &rows, int64_t entry, int64_t time, int64_t rank = 0, int64_t group = 0) {
  return static_cast<T *>(rows.data) + entry * rows.batch_stride + time * rows.time_stride + rank * rows.rank_stride +
         group * rows.group_stride;
}

// Asks for a row ahead of its use. Rows of a block lie a whole step apart, which the processor's own prefetching of
// streams does not follow; without this half of a scan's time is waiting.
template <typename T>
MAMBAKIT_INLINE void prefetch_row(const T *row, int count) {
#if !defined(_MSC_VER) || defined(__clang__)
  for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(row + i);
#else
  (void)row, (void)count;
#endif
}

// row[0..count) = widened source; row[count..size) = 0.
template <typename T, typename S>
MAMBAKIT_INLINE void read_row(const T *source, int count, int size, S *row) {
  int i = 0;
  for (; i < count; ++i) row[i] = widen(source[i]);
  for (; i < size; ++i) row[i] = S(0);
}

template <typename T, typename S>
MAMBAKIT_INLINE void write_row(const S *row, int count, T *target) {
  for (int i = 0; i < count; ++i) target[i] = narrow<T>(row[i]);
}

#if defined(__F16C__)
template <>
MAMBAKIT_INLINE void read_row<float16, float>(const float16 *source, int count, int size, float *row) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(source + i))));
  for (; i < count; ++i) row[i] = widen(source[i]);
  for (; i < size; ++i) row[i] = 0.0f;
}

template <>
MAMBAKIT_INLINE void write_row<float16, float>(const float *row, int count, float16 *target) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < count; ++i) target[i] = narrow<float16>(row[i]);
}
#endif

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
