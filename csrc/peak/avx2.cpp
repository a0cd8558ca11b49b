#include <immintrin.h>

#include "peak.h"

namespace pycompress::peak {
namespace {

// One instruction each, which the compiler may neither merge nor drop.
inline __m256i multiply_bytes(__m256i a, __m256i b) {
  __m256i r;
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(r) : "x"(a), "x"(b));
  return r;
}
inline void add16(__m256i& sum, __m256i v) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v)); }
inline void widen(__m256i& v, __m256i ones) { asm volatile("vpmaddwd %1, %0, %0" : "+x"(v) : "x"(ones)); }
inline void add32(__m256i& sum, __m256i v) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v)); }
inline void fma(__m256& sum, __m256 a, __m256 b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

constexpr int kChains = 8;  // independent accumulators: enough to hide every latency

}  // namespace

template <int kDepth>
double maddubs(int64_t count) {
  const __m256i a = _mm256_set1_epi8(1), b = a, ones = _mm256_set1_epi16(1);
  __m256i sum[kChains];
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) sum[i] = _mm256_setzero_si256();
  for (int64_t round = 0; round < count; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      __m256i chain = multiply_bytes(a, b);
#pragma GCC unroll 8
      for (int d = 1; d < kDepth; ++d) add16(chain, multiply_bytes(a, b));
      widen(chain, ones);
      add32(sum[i], chain);
    }
  }
  return 2.0 * 32 * kDepth * kChains * static_cast<double>(count);
}
template double maddubs<1>(int64_t);
template double maddubs<2>(int64_t);
template double maddubs<4>(int64_t);
template double maddubs<8>(int64_t);

double fp32_fma(int64_t count) {
  constexpr int chains = 12;
  const __m256 a = _mm256_set1_ps(0.5f);
  __m256 sum[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sum[i] = a;
  for (int64_t round = 0; round < count; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) fma(sum[i], a, a);
  }
  return 2.0 * 8 * chains * static_cast<double>(count);
}

double read(const uint8_t* data, int64_t bytes) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<double>(_mm256_extract_epi32(all, 0));
}

}  // namespace pycompress::peak
