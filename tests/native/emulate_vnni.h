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

// The tiles of AMX: as many rows of as many bytes as were configured.
struct Tiles {
  uint8_t row_bytes[8], rows[8];
  uint8_t bytes[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles own;
  return own;
}
inline void load_config(const void* p) {
  const auto* config = static_cast<const uint8_t*>(p);
  for (int i = 0; i < 8; ++i) {
    tiles().row_bytes[i] = config[16 + 2 * i];
    tiles().rows[i] = config[48 + i];
  }
}
inline void release() { std::memset(&tiles(), 0, sizeof(Tiles)); }
inline void zero_tile(int t) { std::memset(tiles().bytes[t], 0, sizeof(tiles().bytes[t])); }
inline void load_tile(int t, const void* p, ptrdiff_t stride) {
  zero_tile(t);
  for (int row = 0; row < tiles().rows[t]; ++row)
    std::memcpy(tiles().bytes[t][row], static_cast<const uint8_t*>(p) + row * stride, tiles().row_bytes[t]);
}
inline void store_tile(int t, void* p, ptrdiff_t stride) {
  for (int row = 0; row < tiles().rows[t]; ++row)
    std::memcpy(static_cast<uint8_t*>(p) + row * stride, tiles().bytes[t][row], tiles().row_bytes[t]);
}
inline void dot_tiles(int sum, int a, int b) {
  for (int m = 0; m < tiles().rows[sum]; ++m)
    for (int k = 0; k < tiles().row_bytes[a] / 4; ++k)
      for (int n = 0; n < tiles().row_bytes[sum] / 4; ++n) {
        int32_t total;
        std::memcpy(&total, tiles().bytes[sum][m] + 4 * n, 4);
        dot4(&total, tiles().bytes[a][m] + 4 * k, reinterpret_cast<int8_t*>(tiles().bytes[b][k] + 4 * n), 1);
        std::memcpy(tiles().bytes[sum][m] + 4 * n, &total, 4);
      }
}

}  // namespace emulated

#define kAvxVnni kAvxVnniEmulated
#define kAmx kAmxEmulated
#define tile_avx512_vnni tile_avx512_vnni_emulated
#define quantize_avx512 quantize_avx2
#define finish_avx512 finish_avx2
#define kAvx512Vnni kAvx512VnniEmulated
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i, 8>
#define __m512i emulated::Vector512
#define _mm512_dpbusd_epi32 emulated::dpbusd<emulated::Vector512, 16>
#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_si512 emulated::store
#define _mm512_setzero_si512 emulated::zero
#define _mm512_set1_epi32 emulated::broadcast
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_zero emulated::zero_tile
#define _tile_dpbusd emulated::dot_tiles
