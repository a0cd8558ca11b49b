// AVX2: eight numbers at a time. Floors: extremes and quantize, the bytes of x; depthwise, two fma a cycle, each of
// which loads its operand.
#include "../common/avx2_transpose.h"
#include "../common/avx2_vector.h"
#include "../common/float16.h"
#include "conv.h"
#include "kernel_list.h"

namespace pycompress::conv {
namespace {

inline Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.value * b.value + c.value}; }
inline Scalar larger(Scalar a, Scalar b) { return {a.value > b.value ? a.value : b.value}; }
inline Scalar smaller(Scalar a, Scalar b) { return {a.value < b.value ? a.value : b.value}; }
inline Vector smaller(Vector a, Vector b) { return {_mm256_min_ps(a.value, b.value)}; }
inline Scalar rounded(Scalar a) { return {__builtin_nearbyintf(a.value)}; }
inline Vector rounded(Vector a) { return {_mm256_round_ps(a.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
using pycompress::fma;
using pycompress::larger;

template <class V, Type kType>
V load_as(const void* x, int64_t i, int64_t count) {
  if constexpr (kType == Type::uint8) {
    int64_t bytes = 0;
    __builtin_memcpy(&bytes, static_cast<const uint8_t*>(x) + i, count >= 8 ? 8 : static_cast<size_t>(count));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)))};
  } else {
    return {count >= 8 ? load_floats<kType>(x, i) : load_tail<kType>(x, i, static_cast<int>(count))};
  }
}
template <Type kType>
void store_as(void* y, int64_t i, Vector v, int64_t count) {
  constexpr size_t size = size_of(kType);
  const auto result = converted<kType>(_mm256_cvtps_epi32(v.value), v.value);
  auto* at = static_cast<uint8_t*>(y) + static_cast<size_t>(i) * size;
  if (count >= 8)
    __builtin_memcpy(at, &result, sizeof(result));
  else
    __builtin_memcpy(at, &result, static_cast<size_t>(count) * size);
}
inline void store_bytes(uint8_t* y, Vector v, const int8::Requantize& to, int64_t count) {
  const int64_t bytes = requantized(v.value, to.inverse, to.low, to.high, to.zero_point);
  __builtin_memcpy(y, &bytes, count >= 8 ? 8 : static_cast<size_t>(count));
}

}  // namespace
}  // namespace pycompress::conv

#include "depthwise.h"

namespace pycompress::conv {
namespace {

template <Type kType>
Extremes extremes_of(const void* x, int64_t count) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero}, poison[4] = {zero, zero, zero, zero};
  const auto take = [&](int j, __m256 v) {
    low[j] = _mm256_min_ps(low[j], v);
    high[j] = _mm256_max_ps(high[j], v);
    poison[j] = _mm256_fmadd_ps(v, zero, poison[j]);  // 0 where finite, NaN for ever after NaN or Inf
  };
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) take(j, load_floats<kType>(x, i + 8 * j));
  for (; i < count; i += 8) take(0, load_as<Vector, kType>(x, i, count - i).value);
  float lows[8], highs[8], poisons[8];
  _mm256_storeu_ps(lows, _mm256_min_ps(_mm256_min_ps(low[0], low[1]), _mm256_min_ps(low[2], low[3])));
  _mm256_storeu_ps(highs, _mm256_max_ps(_mm256_max_ps(high[0], high[1]), _mm256_max_ps(high[2], high[3])));
  _mm256_storeu_ps(poisons, _mm256_add_ps(_mm256_add_ps(poison[0], poison[1]), _mm256_add_ps(poison[2], poison[3])));
  Extremes found{0, 0, true};
  for (int j = 0; j < 8; ++j) {
    found.low = lows[j] < found.low ? lows[j] : found.low;
    found.high = highs[j] > found.high ? highs[j] : found.high;
    found.finite = found.finite && poisons[j] == 0.0f;
  }
  return found;
}

Extremes extremes(const void* x, Type type, int64_t count) {
  if (type == Type::bfloat16) return extremes_of<Type::bfloat16>(x, count);
  if (type == Type::float16) return extremes_of<Type::float16>(x, count);
  return extremes_of<Type::float32>(x, count);
}

// Eight integers q of eight values.
template <Type kType>
inline __m256i integers(const void* x, int64_t i, int64_t count, const Range& range, int amax, Vector& poison) {
  const Vector value = load_as<Vector, kType>(x, i, count), v = Quantizer<Vector>(range, amax)(value);
  poison = fma(value, Vector::of(0.0f), poison);  // 0 where finite, NaN for ever after NaN or Inf
  return _mm256_add_epi32(_mm256_cvtps_epi32(v.value), _mm256_set1_epi32(range.zero_point));
}

template <Type kType>
void quantize_line(const void* x, int64_t at, int64_t count, const Range& range, int amax, Vector& poison, uint8_t* q) {
  const __m256i unlace = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the in-lane packs
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = integers<kType>(x, at + i + 8 * j, 8, range, amax, poison);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    store256(q + i, _mm256_permutevar8x32_epi32(bytes, unlace));
  }
  for (; i < count; i += 8) {
    int32_t rest[8];
    store256(rest, integers<kType>(x, at + i, count - i, range, amax, poison));
    for (int64_t j = 0; j < 8 && i + j < count; ++j) q[i + j] = static_cast<uint8_t>(rest[j]);
  }
}

// Eight positions of four channels make eight words of four bytes, one for each position.
template <Type kType>
void quantize_turned(const void* x, int64_t channels, int64_t positions, int64_t channel_stride, const Range& range,
                     int amax, Vector& poison, uint8_t* q, int64_t ldq) {
  for (int64_t i = 0; i < positions; i += 8) {
    const int64_t count = positions - i < 8 ? positions - i : 8;
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = integers<kType>(x, (c + j) * channel_stride + i, count, range, amax, poison);
      const __m256i low = _mm256_or_si256(v[0], _mm256_slli_epi32(v[1], 8));
      const __m256i high = _mm256_or_si256(_mm256_slli_epi32(v[2], 16), _mm256_slli_epi32(v[3], 24));
      int32_t words[8];
      store256(words, _mm256_or_si256(low, high));
      for (int64_t j = 0; j < count; ++j) __builtin_memcpy(q + (i + j) * ldq + c, words + j, 4);
    }
    for (; c < channels; ++c) {
      int32_t words[8];
      store256(words, integers<kType>(x, c * channel_stride + i, count, range, amax, poison));
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

void reorder_avx2(const uint8_t* row, int8::ActivationShape shape, uint8_t* data) {
  const __m256i orders[int8::kVersions] = {
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)),
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10, 12, 15, 13, 14))};
  for (int block = 0; block < shape.blocks(); ++block) {
    const int length = shape.length(block);
    const uint8_t* in = row + static_cast<ptrdiff_t>(block) * int8::kBlockK;
    uint8_t* out = data + shape.offset(block);
    for (int i = 0; i < length; i += 32) {
      const __m256i bytes = load256(in + i);
      for (int v = 0; v < shape.versions; ++v) store256(out + v * length + i, _mm256_shuffle_epi8(bytes, orders[v]));
    }
  }
}

void transpose_avx2(const void* from, int64_t ld, int rows, int columns, size_t size, void* to, int64_t stride) {
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  int done = 0;
  if (size == 4)
    for (; done + 8 <= rows; done += 8) {
      int c = 0;
      for (; c + 8 <= columns; c += 8) {
        __m256 r[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
          r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(source) + (done + j) * ld + c);
        transpose(r);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) _mm256_storeu_ps(reinterpret_cast<float*>(target) + (c + j) * stride + done, r[j]);
      }
      for (; c < columns; ++c)
        for (int j = 0; j < 8; ++j)
          __builtin_memcpy(target + static_cast<size_t>(c * stride + done + j) * 4,
                           source + static_cast<size_t>((done + j) * ld + c) * 4, 4);
    }
  for (; done < rows; ++done)
    for (int c = 0; c < columns; ++c)
      __builtin_memcpy(target + static_cast<size_t>(c * stride + done) * size,
                       source + static_cast<size_t>(done * ld + c) * size, size);
}

const Kernel kAvx2{"avx2",       Isa::avx2,      kPixels,          8, 1, extremes, quantize,
                   reorder_avx2, transpose_avx2, depthwise<Vector>};

}  // namespace pycompress::conv
