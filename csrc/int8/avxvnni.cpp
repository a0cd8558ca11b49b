// AVX-VNNI (Alder Lake, Zen 5 and later): 6 rows x 16 channels. `vpdpbusd` adds four u8 * s8 products straight into 32
// bits without saturating. Floor: one vpdpbusd per 32 products, two a cycle.
#include <immintrin.h>

#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 6, kNr = 16;

template <int kRows>
void tile_rows(const uint8_t* a, ptrdiff_t lda, const int8_t* w, int groups, int32_t* c, bool accumulate) {
  __m256i acc[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      acc[i][j] = accumulate ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + kNr * i + 8 * j))
                             : _mm256_setzero_si256();
  for (int g = 0; g < groups; ++g, a += 4, w += 4 * kNr) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      int32_t group;
      __builtin_memcpy(&group, a + i * lda, 4);
      const __m256i x = _mm256_set1_epi32(group);
      acc[i][0] = _mm256_dpbusd_avx_epi32(acc[i][0], x, w0);
      acc[i][1] = _mm256_dpbusd_avx_epi32(acc[i][1], x, w1);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + kNr * i + 8 * j), acc[i][j]);
}

void tile(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c, bool accumulate) {
  using Rows = void (*)(const uint8_t*, ptrdiff_t, const int8_t*, int, int32_t*, bool);
  static constexpr Rows table[kMr] = {tile_rows<1>, tile_rows<2>, tile_rows<3>,
                                      tile_rows<4>, tile_rows<5>, tile_rows<6>};
  table[rows - 1](a, lda, static_cast<const int8_t*>(panel), length / 4, c, accumulate);
}

}  // namespace

const Kernel kAvxVnni{"avx_vnni_6x16", Isa::avx_vnni, kMr, kNr, 4, Layout::dot4, quantize_avx2, tile, finish_avx2};

}  // namespace pycompress::int8
