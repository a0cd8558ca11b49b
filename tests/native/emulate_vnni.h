// Stand-ins for the instructions of the VNNI kernels, and other names for what those files export.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Vector512 {
  int32_t lane[16];
};

inline void dot4(int32_t* sum, const uint8_t* a, const int8_t* b, int lanes) {
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += static_cast<int32_t>(a[4 * i + j]) * b[4 * i + j];
}

template <class V, int kLanes>
V dpbusd(V sum, V a, V b) {
  int32_t s[kLanes];
  uint8_t u[4 * kLanes];
  int8_t v[4 * kLanes];
  std::memcpy(s, &sum, sizeof(s));
  std::memcpy(u, &a, sizeof(u));
  std::memcpy(v, &b, sizeof(v));
  dot4(s, u, v, kLanes);
  std::memcpy(&sum, s, sizeof(s));
  return sum;
}

inline Vector512 load(const void* p) {
  Vector512 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vector512 zero() { return {}; }
inline Vector512 broadcast(int32_t value) {
  Vector512 v;
  for (int32_t& lane : v.lane) lane = value;
  return v;
}
inline void store(void* p, Vector512 v) { std::memcpy(p, &v, sizeof(v)); }

}  // namespace emulated

#define kAvxVnni kAvxVnniEmulated
#define kAvx512Vnni kAvx512VnniEmulated
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i, 8>
#define __m512i emulated::Vector512
#define _mm512_dpbusd_epi32 emulated::dpbusd<emulated::Vector512, 16>
#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_si512 emulated::store
#define _mm512_setzero_si512 emulated::zero
#define _mm512_set1_epi32 emulated::broadcast
