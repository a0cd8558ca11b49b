// What the AVX2 kernels share: loads of any float type, the vector type of the activations, conversions. Everything is
// in an anonymous namespace, because each instruction-set file compiles its own copy and the linker must not merge
// them.
#pragma once

#include <immintrin.h>

#include "activation.h"

// Without this g++ reorders the sums of several rows into each other and spills the accumulators: a third of the speed.
#define KEEP_IN_REGISTER(v) asm("" : "+x"(v))

namespace pycompress {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

template <Type kType>
inline __m256 load_floats(const void* x, ptrdiff_t i) {
  if constexpr (kType == Type::float32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if constexpr (kType == Type::bfloat16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  return _mm256_cvtph_ps(half);
}

// The last k % 8 elements of a row, zeros behind them: a zero changes neither the range nor, times zero, the sum.
template <Type kType>
inline __m256 load_tail(const void* x, ptrdiff_t i, int count) {
  alignas(32) unsigned char buffer[32] = {};
  constexpr int size = kType == Type::float32 ? 4 : 2;
  for (int byte = 0; byte < count * size; ++byte) buffer[byte] = static_cast<const unsigned char*>(x)[i * size + byte];
  return load_floats<kType>(buffer, 0);
}

struct Vector {
  static constexpr int kWidth = 8, kSums = 12;  // floats; sums that fit the registers beside their operands
  __m256 value;
  static Vector of(float v) { return {_mm256_set1_ps(v)}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, value); }
};
inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.value, b.value)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.value, b.value)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.value, b.value)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.value, b.value)}; }
inline Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return {_mm256_blendv_ps(no.value, yes.value, _mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ))};
}
inline Vector power_of_two(Vector n) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.value), _mm256_set1_epi32(127)), 23))};
}

inline Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
inline Vector larger(Vector a, Vector b) { return {_mm256_max_ps(a.value, b.value)}; }  // b where one of them is NaN

inline __m128i to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <Type kType>
inline auto converted(__m256i acc, __m256 value) {
  if constexpr (kType == Type::int32) return acc;
  if constexpr (kType == Type::float32) return value;
  if constexpr (kType == Type::bfloat16) return to_bfloat16(value);
  if constexpr (kType == Type::float16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

// Eight bytes rint(clamp(v * inverse, low, high)) + zero_point; of NaN as of low.
inline int64_t requantized(__m256 v, float inverse, float low, float high, int32_t zero_point) {
  const __m256 steps = _mm256_max_ps(_mm256_mul_ps(v, _mm256_set1_ps(inverse)), _mm256_set1_ps(low));
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_min_ps(steps, _mm256_set1_ps(high)));
  const __m256i q = _mm256_add_epi32(rounded, _mm256_set1_epi32(zero_point));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}

// y[count] = the floats, of which there are as many as fill the last eight, rounded to a float type.
template <Type kType>
inline void put_floats_as(const float* floats, int64_t count, void* y) {
  constexpr int size = kType == Type::float32 ? 4 : 2;
  auto* at = static_cast<unsigned char*>(y);
  for (int64_t i = 0; i < count; i += 8) {
    const auto rounded = converted<kType>(__m256i{}, _mm256_loadu_ps(floats + i));
    __builtin_memcpy(at + i * size, &rounded, static_cast<size_t>(count - i < 8 ? (count - i) * size : 8 * size));
  }
}

inline void put_floats(const float* floats, int64_t count, void* y, Type type) {
  if (type == Type::float32) put_floats_as<Type::float32>(floats, count, y);
  if (type == Type::bfloat16) put_floats_as<Type::bfloat16>(floats, count, y);
  if (type == Type::float16) put_floats_as<Type::float16>(floats, count, y);
}

// Up to eight floats, zeros behind them.
inline __m256 load_floats_up_to(const float* p, int count) {
  if (p == nullptr) return _mm256_setzero_ps();
  if (count >= 8) return _mm256_loadu_ps(p);
  float buffer[8] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return _mm256_loadu_ps(buffer);
}

inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_up_to(const float* p, int count) {
  return count >= 8 ? Vector::load(p) : Vector{_mm256_maskload_ps(p, first_lanes(count))};
}
inline void store_up_to(float* p, Vector v, int count) {
  if (count >= 8) return v.store(p);
  _mm256_maskstore_ps(p, first_lanes(count), v.value);
}
// Zeros behind the first `count`.
inline Vector only(Vector v, int count) {
  return count >= 8 ? v : Vector{_mm256_and_ps(v.value, _mm256_castsi256_ps(first_lanes(count)))};
}

}  // namespace
}  // namespace pycompress
