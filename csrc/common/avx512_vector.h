// The vector type of avx2_vector.h in 512 bits, for code that is written once over either. In an anonymous namespace,
// because each instruction-set file compiles its own copy and the linker must not merge them.
#pragma once

#include <immintrin.h>

#include "activation.h"

// See avx2_vector.h.
#define KEEP_IN_REGISTER(v) asm("" : "+v"(v))

namespace pycompress {
namespace {

struct Vector {
  static constexpr int kWidth = 16, kSums = 24;  // floats; sums that fit the registers beside their operands
  __m512 value;
  static Vector of(float v) { return {_mm512_set1_ps(v)}; }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, value); }
};
inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.value, b.value)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.value, b.value)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.value, b.value)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
inline Vector larger(Vector a, Vector b) { return {_mm512_max_ps(a.value, b.value)}; }  // b where one of them is NaN
inline Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ), no.value, yes.value)};
}
inline Vector power_of_two(Vector n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.value), _mm512_set1_epi32(127)), 23))};
}

// Sixteen bytes rint(clamp(v * inverse, low, high)) + zero_point; of NaN as of low.
inline __m128i requantized(__m512 v, float inverse, float low, float high, int32_t zero_point) {
  const __m512 steps = _mm512_max_ps(_mm512_mul_ps(v, _mm512_set1_ps(inverse)), _mm512_set1_ps(low));
  const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(steps, _mm512_set1_ps(high)));
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(zero_point)));
}

// Sixty-four bytes of as many whole numbers, in order: their sums with `zero` in each of its 32 lanes, those below 0
// made 0. No number is above 255 - zero.
inline __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d, __m512i zero) {
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector load_up_to(const float* p, int count) {
  return count >= 16 ? Vector::load(p) : Vector{_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
inline void store_up_to(float* p, Vector v, int count) {
  if (count >= 16) return v.store(p);
  _mm512_mask_storeu_ps(p, first_lanes(count), v.value);
}
// Zeros behind the first `count`.
inline Vector only(Vector v, int count) {
  return count >= 16 ? v : Vector{_mm512_maskz_mov_ps(first_lanes(count), v.value)};
}

}  // namespace
}  // namespace pycompress
