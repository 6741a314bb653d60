// Vectors of float from memory of any floating type, whole ones and the part of one at the end of a row.
#pragma once

#include "rows.hpp"

namespace mambakit {
namespace MAMBAKIT_ISA {

// lanes<float> values, widened.
template <typename T>
MAMBAKIT_INLINE Vec<float> load_wide(const T *p) {
  float row[lanes<float>];
  for (int i = 0; i < lanes<float>; ++i) row[i] = widen(p[i]);
  return load(row);
}
template <>
MAMBAKIT_INLINE Vec<float> load_wide<float>(const float *p) {
  return load(p);
}

#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
// Masked by all ones where the plain form has the compiler warn of its own header.
template <>
MAMBAKIT_INLINE Vec<float> load_wide<bfloat16>(const bfloat16 *p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return (Vec<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
}
template <>
MAMBAKIT_INLINE Vec<float> load_wide<float16>(const float16 *p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, bits);
}
template <>
MAMBAKIT_INLINE Vec<float> load_wide<int8_t>(const int8_t *p) {
  const __m512i whole = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, whole);
}
#elif defined(__AVX2__) && defined(__F16C__) && !defined(MAMBAKIT_PLAIN_VECTORS)
template <>
MAMBAKIT_INLINE Vec<float> load_wide<int8_t>(const int8_t *p) {
  return (Vec<float>)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
template <>
MAMBAKIT_INLINE Vec<float> load_wide<bfloat16>(const bfloat16 *p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
template <>
MAMBAKIT_INLINE Vec<float> load_wide<float16>(const float16 *p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
#endif

// The first `count` of lanes<float> values, widened, and zeros after them; memory beyond them is not touched.
template <typename T>
MAMBAKIT_INLINE Vec<float> load_part(const T *p, int count) {
  float row[lanes<float>];
  for (int i = 0; i < lanes<float>; ++i) row[i] = 0.0f;
  for (int i = 0; i < count; ++i) row[i] = widen(p[i]);
  return load(row);
}

MAMBAKIT_INLINE void store_part(float *p, Vec<float> v, int count) {
#if defined(__AVX512F__) && !defined(MAMBAKIT_PLAIN_VECTORS)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#else
  float row[lanes<float>];
  store(row, v);
  for (int i = 0; i < count; ++i) p[i] = row[i];
#endif
}

#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(MAMBAKIT_PLAIN_VECTORS)
template <>
MAMBAKIT_INLINE Vec<float> load_part<float>(const float *p, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
template <>
MAMBAKIT_INLINE Vec<float> load_part<bfloat16>(const bfloat16 *p, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
  return (Vec<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
}
template <>
MAMBAKIT_INLINE Vec<float> load_part<float16>(const float16 *p, int count) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
}
#endif

// The vector at `p` of a row that has `left` values more, as `load_wide` or `load_part` reads it.
template <typename T>
MAMBAKIT_INLINE Vec<float> load_some(const T *p, int64_t left) {
  return left >= lanes<float> ? load_wide(p) : load_part(p, int(left));
}
MAMBAKIT_INLINE void store_some(float *p, Vec<float> v, int64_t left) {
  if (left >= lanes<float>) store(p, v);
  else store_part(p, v, int(left));
}

}  // namespace MAMBAKIT_ISA
}  // namespace mambakit
