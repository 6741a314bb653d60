// Vectors of floating-point lanes, as wide as the instruction set allows, and the few functions that the kernels need.
//
// Everything here lives in a namespace of its own for each instruction set. Kernel sources use no templates of the
// standard library: the linker keeps one copy of each, and it could be the one that an older processor can't run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__) && !defined(MAMBAKIT_PLAIN_VECTORS)
#define MAMBAKIT_PLAIN_VECTORS
#endif
#ifdef MAMBAKIT_INLINE  // as the build defines it
#elif defined(_MSC_VER) && !defined(__clang__)
#define MAMBAKIT_INLINE __forceinline
#else
#define MAMBAKIT_INLINE inline __attribute__((always_inline))
#endif

#if defined(__AVX512F__)
#define MAMBAKIT_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MAMBAKIT_VECTOR_BYTES 32
#else
#define MAMBAKIT_VECTOR_BYTES 16
#endif

namespace mambakit {
namespace MAMBAKIT_ISA {

template <typename S>
constexpr int lanes = MAMBAKIT_VECTOR_BYTES / int(sizeof(S));

#ifdef MAMBAKIT_PLAIN_VECTORS
template <typename S>
struct Lanes {
  S lane[lanes<S>];
  S &operator[](int i) { return lane[i]; }
  S operator[](int i) const { return lane[i]; }
};
#define MAMBAKIT_LANEWISE(op)                                         \
  template <typename S>                                               \
  MAMBAKIT_INLINE Lanes<S> operator op(Lanes<S> a, Lanes<S> b) {      \
    for (int i = 0; i < lanes<S>; ++i) a.lane[i] = a.lane[i] op b.lane[i]; \
    return a;                                                         \
  }
MAMBAKIT_LANEWISE(+)
MAMBAKIT_LANEWISE(-)
MAMBAKIT_LANEWISE(*)
MAMBAKIT_LANEWISE(/)
#undef MAMBAKIT_LANEWISE
template <typename S>
struct VectorOf {
  using type = Lanes<S>;
};
#else
template <typename S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MAMBAKIT_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MAMBAKIT_VECTOR_BYTES)));
};
#endif

template <typename S>
using Vec = typename VectorOf<S>::type;

template <typename S>
MAMBAKIT_INLINE Vec<S> load(const S *p) {
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename S>
MAMBAKIT_INLINE void store(S *p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename S>
MAMBAKIT_INLINE Vec<S> fill(S x) {
#ifdef MAMBAKIT_PLAIN_VECTORS
  Vec<S> v;
  for (int i = 0; i < lanes<S>; ++i) v[i] = x;
  return v;
#else
  return x - Vec<S>{};  // not {} + x, which would turn -0 into +0
#endif
}

// max and min that hand on a NaN in x.
template <typename S>
MAMBAKIT_INLINE Vec<S> at_least(Vec<S> x, S bound) {
#ifdef MAMBAKIT_PLAIN_VECTORS
  for (int i = 0; i < lanes<S>; ++i) x[i] = x[i] < bound ? bound : x[i];
  return x;
#else
  const Vec<S> b = fill(bound);
  return x < b ? b : x;
#endif
}

template <typename S>
MAMBAKIT_INLINE Vec<S> at_most(Vec<S> x, S bound) {
#ifdef MAMBAKIT_PLAIN_VECTORS
  for (int i = 0; i < lanes<S>; ++i) x[i] = x[i] > bound ? bound : x[i];
  return x;
#else
  const Vec<S> b = fill(bound);
  return x > b ? b : x;
#endif
}

template <typename S>
MAMBAKIT_INLINE S sum_of_lanes(Vec<S> v) {
  S lane[lanes<S>];
  store(lane, v);
  for (int width = lanes<S> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
template <>
MAMBAKIT_INLINE float sum_of_lanes<float>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
#endif

// Lane i is the sum of the lanes of v[i].
MAMBAKIT_INLINE Vec<float> sums_of_rows(const Vec<float> *v) {
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
  // Each stage adds the two halves of what is left of every row and puts two rows into one vector.
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, a, b), _mm512_maskz_unpackhi_ps(0xffff, a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, a, b)),
                             _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, a, b)));
  }
  const auto across = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88), _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd));
  };
  return (Vec<float>)across(across(fours[0], fours[1]), across(fours[2], fours[3]));
#else
  float sums[lanes<float>];
  for (int i = 0; i < lanes<float>; ++i) sums[i] = sum_of_lanes<float>(v[i]);
  return load(sums);
#endif
}

// 2^x. For float: x = n + f with n whole and |f| <= 1/2; 2^f by the polynomial of degree 6 with the least relative
// error (2e-9 before rounding), 2^n by placing n in the exponent. 0 far below, infinity far above, NaN for NaN.
MAMBAKIT_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float c1 = 0.693147203f, c2 = 0.240226479f, c3 = 0.0555033247f, c4 = 0.00961843736f, c5 = 0.00133988744f,
                  c6 = 0.000153533619f;
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
  const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> f = x - (Vec<float>)whole;
  Vec<float> p = fill(c6);
  p = p * f + fill(c5);
  p = p * f + fill(c4);
  p = p * f + fill(c3);
  p = p * f + fill(c2);
  p = p * f + fill(c1);
  p = p * f + fill(1.0f);
  return (Vec<float>)_mm512_scalef_ps((__m512)p, whole);
#else
  constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, held in the low bits
  x = at_most(at_least(x, -127.0f), 128.0f);
  const Vec<float> shifted = x + fill(shifter);
  const Vec<float> f = x - (shifted - fill(shifter));
  Vec<float> p = fill(c6);
  p = p * f + fill(c5);
  p = p * f + fill(c4);
  p = p * f + fill(c3);
  p = p * f + fill(c2);
  p = p * f + fill(c1);
  p = p * f + fill(1.0f);
  uint32_t bits[lanes<float>];
  std::memcpy(bits, &shifted, sizeof bits);
  for (int i = 0; i < lanes<float>; ++i) bits[i] = (bits[i] << 23) + (127u << 23);
  Vec<float> scale;
  std::memcpy(&scale, bits, sizeof bits);
  return p * scale;
#endif
}

MAMBAKIT_INLINE Vec<double> exp2(Vec<double> x) {
  double lane[lanes<double>];
  store(lane, x);
  for (int i = 0; i < lanes<double>; ++i) lane[i] = std::exp2(lane[i]);
  return load(lane);
}

template <typename S>
constexpr S log2_e = S(1.4426950408889634074);

template <typename S>
MAMBAKIT_INLINE Vec<S> exp(Vec<S> x) {
  return exp2(x * fill(log2_e<S>));
}

// 1 / x of a finite x that is not subnormal.
MAMBAKIT_INLINE Vec<double> reciprocal(Vec<double> x) { return fill(1.0) / x; }
MAMBAKIT_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
  // Newton's step from 14 bits, where a division would take as long as a dozen products.
  const Vec<float> near = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return near + near * (fill(1.0f) - x * near);
#else
  return fill(1.0f) / x;
#endif
}

template <typename S>
MAMBAKIT_INLINE Vec<S> sigmoid(Vec<S> x) {
  return reciprocal(fill(S(1)) + exp<S>(fill(S(0)) - at_least(x, S(-87))));
}

// log(1 + y) for y in [0, 1]: 2 atanh(s), s = y / (2 + y) <= 1/3, by its power series.
MAMBAKIT_INLINE Vec<float> log1p_of_fraction(Vec<float> y) {
  const Vec<float> s = y * reciprocal(y + fill(2.0f)), q = s * s;
  Vec<float> p = fill(2.0f / 15);
  p = p * q + fill(2.0f / 13);
  p = p * q + fill(2.0f / 11);
  p = p * q + fill(2.0f / 9);
  p = p * q + fill(2.0f / 7);
  p = p * q + fill(2.0f / 5);
  p = p * q + fill(2.0f / 3);
  return s * (p * q + fill(2.0f));
}

MAMBAKIT_INLINE Vec<double> log1p_of_fraction(Vec<double> y) {
  double lane[lanes<double>];
  store(lane, y);
  for (int i = 0; i < lanes<double>; ++i) lane[i] = std::log1p(lane[i]);
  return load(lane);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|).
template <typename S>
MAMBAKIT_INLINE Vec<S> softplus(Vec<S> x) {
  const Vec<S> positive = at_least(x, S(0)), negative = at_most(x, S(0));
  return positive + log1p_of_fraction(exp<S>(negative - positive));
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
