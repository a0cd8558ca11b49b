// avx2.cpp in 512 bits: the same float32 steps, so the same bits.
#include "../common/avx512_vector.h"
#include "../common/float16.h"
#include "conv.h"
#include "kernel_list.h"

namespace pycompress::conv {
namespace {

constexpr int kLanes = Vector::kWidth;

inline Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.value * b.value + c.value}; }
inline Scalar larger(Scalar a, Scalar b) { return {a.value > b.value ? a.value : b.value}; }
inline Scalar smaller(Scalar a, Scalar b) { return {a.value < b.value ? a.value : b.value}; }
inline Vector smaller(Vector a, Vector b) { return {_mm512_min_ps(a.value, b.value)}; }
inline Scalar rounded(Scalar a) { return {__builtin_nearbyintf(a.value)}; }
inline Vector rounded(Vector a) {
  return {_mm512_roundscale_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
using pycompress::fma;
using pycompress::larger;

inline __mmask16 up_to(int64_t count) {
  return count >= kLanes ? 0xffff : count > 0 ? first_lanes(static_cast<int>(count)) : 0;
}

template <class V, Type kType>
V load_as(const void* x, int64_t i, int64_t count) {
  const __mmask16 lanes = up_to(count);
  if constexpr (kType == Type::uint8)
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, static_cast<const uint8_t*>(x) + i)))};
  if constexpr (kType == Type::float32) return {_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + i)};
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + i);
  if constexpr (kType == Type::bfloat16)
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  return {_mm512_cvtph_ps(half)};
}
inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, nearest, quiet), 16));
}
template <Type kType>
void store_as(void* y, int64_t i, Vector v, int64_t count) {
  const __mmask16 lanes = up_to(count);
  if constexpr (kType == Type::int32)
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(y) + i, lanes, _mm512_cvtps_epi32(v.value));
  else if constexpr (kType == Type::float32)
    _mm512_mask_storeu_ps(static_cast<float*>(y) + i, lanes, v.value);
  else if constexpr (kType == Type::bfloat16)
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, lanes, to_bfloat16(v.value));
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, lanes, _mm512_cvtps_ph(v.value, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bytes(uint8_t* y, Vector v, const int8::Requantize& to, int64_t count) {
  const __m128i bytes = requantized(v.value, to.inverse, to.low, to.high, to.zero_point);
  if (count >= kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
  else
    _mm_mask_storeu_epi8(y, up_to(count), bytes);
}

}  // namespace
}  // namespace pycompress::conv

#include "depthwise.h"

namespace pycompress::conv {
namespace {

template <Type kType>
Extremes extremes_of(const void* x, int64_t count) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero}, poison[4] = {zero, zero, zero, zero};
  const auto take = [&](int j, __m512 v) {
    low[j] = _mm512_min_ps(low[j], v);
    high[j] = _mm512_max_ps(high[j], v);
    poison[j] = _mm512_fmadd_ps(v, zero, poison[j]);  // 0 where finite, NaN for ever after NaN or Inf
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) take(j, load_as<Vector, kType>(x, i + j * kLanes, kLanes).value);
  for (; i < count; i += kLanes) take(0, load_as<Vector, kType>(x, i, count - i).value);
  const __m512 bad = _mm512_add_ps(_mm512_add_ps(poison[0], poison[1]), _mm512_add_ps(poison[2], poison[3]));
  return {_mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3]))),
          _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]))),
          _mm512_cmp_ps_mask(bad, bad, _CMP_UNORD_Q) == 0};
}

Extremes extremes(const void* x, Type type, int64_t count) {
  if (type == Type::bfloat16) return extremes_of<Type::bfloat16>(x, count);
  if (type == Type::float16) return extremes_of<Type::float16>(x, count);
  return extremes_of<Type::float32>(x, count);
}

// Sixteen integers q of sixteen values.
template <Type kType>
inline __m512i integers(const void* x, int64_t i, int64_t count, const Range& range, int amax, Vector& poison) {
  const Vector value = load_as<Vector, kType>(x, i, count), v = Quantizer<Vector>(range, amax)(value);
  poison = fma(value, Vector::of(0.0f), poison);  // 0 where finite, NaN for ever after NaN or Inf
  return _mm512_add_epi32(_mm512_cvtps_epi32(v.value), _mm512_set1_epi32(range.zero_point));
}

template <Type kType>
void quantize_line(const void* x, int64_t at, int64_t count, const Range& range, int amax, Vector& poison, uint8_t* q) {
  // The upper end is a whole number: cut off before rounding or behind it is the same. NaN and what is too low for an
  // int give INT_MIN.
  const __m512 inverse = _mm512_set1_ps(range.inverse), none = _mm512_setzero_ps();
  const __m512 high = _mm512_set1_ps(static_cast<float>(amax - range.zero_point));
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(range.zero_point));
  __m512 bad[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 value = load_as<Vector, kType>(x, at + i + j * kLanes, kLanes).value;
      bad[j] = _mm512_fmadd_ps(value, none, bad[j]);  // 0 where finite, NaN for ever after NaN or Inf
      v[j] = _mm512_cvtps_epi32(_mm512_min_ps(high, _mm512_mul_ps(value, inverse)));
    }
    _mm512_storeu_si512(q + i, bytes_of(v[0], v[1], v[2], v[3], zero));
  }
  poison.value =
      _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(bad[0], bad[1]), _mm512_add_ps(bad[2], bad[3])), poison.value);
  for (; i < count; i += kLanes)
    _mm_mask_storeu_epi8(q + i, up_to(count - i),
                         _mm512_cvtepi32_epi8(integers<kType>(x, at + i, count - i, range, amax, poison)));
}

// Sixteen positions of four channels make sixteen words of four bytes, one for each position; of sixteen channels four
// vectors of them, which are turned: sixteen bytes for each position.
template <Type kType>
void quantize_turned(const void* x, int64_t channels, int64_t positions, int64_t channel_stride, const Range& range,
                     int amax, Vector& poison, uint8_t* q, int64_t ldq) {
  const auto words_of = [&](int64_t c, int64_t i, int64_t count) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = integers<kType>(x, (c + j) * channel_stride + i, count, range, amax, poison);
    const __m512i low = _mm512_or_si512(v[0], _mm512_slli_epi32(v[1], 8));
    return _mm512_or_si512(low, _mm512_or_si512(_mm512_slli_epi32(v[2], 16), _mm512_slli_epi32(v[3], 24)));
  };
  for (int64_t i = 0; i < positions; i += kLanes) {
    const int64_t count = positions - i < kLanes ? positions - i : kLanes;
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      const __m512i a = words_of(c, i, count), b = words_of(c + 4, i, count);
      const __m512i d = words_of(c + 8, i, count), e = words_of(c + 12, i, count);
      const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
      const __m512i de_low = _mm512_unpacklo_epi32(d, e), de_high = _mm512_unpackhi_epi32(d, e);
      // Lane l of of[j] is position 4 l + j.
      const __m512i of[4] = {_mm512_unpacklo_epi64(ab_low, de_low), _mm512_unpackhi_epi64(ab_low, de_low),
                             _mm512_unpacklo_epi64(ab_high, de_high), _mm512_unpackhi_epi64(ab_high, de_high)};
      const auto put = [&](int j, __m128i bytes, int l) {
        if (4 * l + j < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(q + (i + 4 * l + j) * ldq + c), bytes);
      };
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        put(j, _mm512_extracti32x4_epi32(of[j], 0), 0);
        put(j, _mm512_extracti32x4_epi32(of[j], 1), 1);
        put(j, _mm512_extracti32x4_epi32(of[j], 2), 2);
        put(j, _mm512_extracti32x4_epi32(of[j], 3), 3);
      }
    }
    for (; c + 4 <= channels; c += 4) {
      int32_t words[kLanes];
      _mm512_storeu_si512(words, words_of(c, i, count));
      for (int64_t j = 0; j < count; ++j) __builtin_memcpy(q + (i + j) * ldq + c, words + j, 4);
    }
    for (; c < channels; ++c) {
      int32_t words[kLanes];
      _mm512_storeu_si512(words, integers<kType>(x, c * channel_stride + i, count, range, amax, poison));
      for (int64_t j = 0; j < count; ++j) q[(i + j) * ldq + c] = static_cast<uint8_t>(words[j]);
    }
  }
}

template <Type kType>
void quantize_of(const void* x, int64_t channels, int64_t positions, int64_t channel_stride, int64_t position_stride,
                 const Range& range, int amax, Vector& poison, uint8_t* q, int64_t ldq) {
  if (channel_stride == 1 && position_stride == channels && ldq == channels)
    return quantize_line<kType>(x, 0, channels * positions, range, amax, poison, q);
  if (channel_stride == 1) {
    for (int64_t i = 0; i < positions; ++i)
      quantize_line<kType>(x, i * position_stride, channels, range, amax, poison, q + i * ldq);
    return;
  }
  quantize_turned<kType>(x, channels, positions, channel_stride, range, amax, poison, q, ldq);
}

bool quantize(const void* x, Type type, int64_t channels, int64_t positions, int64_t channel_stride,
              int64_t position_stride, const Range& range, int amax, uint8_t* q, int64_t ldq) {
  const auto run = type == Type::bfloat16  ? quantize_of<Type::bfloat16>
                   : type == Type::float16 ? quantize_of<Type::float16>
                                           : quantize_of<Type::float32>;
  Vector poison = Vector::of(0.0f);
  run(x, channels, positions, channel_stride, position_stride, range, amax, poison, q, ldq);
  float lanes[Vector::kWidth];
  poison.store(lanes);
  bool finite = true;
  for (const float lane : lanes) finite = finite && lane == 0.0f;
  return finite;
}

}  // namespace

const Kernel kAvx512{"avx512",     Isa::avx512_vnni, kPixels,          16, 1, extremes, quantize,
                     reorder_avx2, transpose_avx2,   depthwise<Vector>};

}  // namespace pycompress::conv
