// AVX-512 VNNI (Cascade Lake, Zen 4 and later): 12 rows x 32 channels. `vpdpbusd` adds four u8 * s8 products straight
// into 32 bits without saturating. Floor: one vpdpbusd per 64 products, two a cycle on Intel servers, one on Zen 4.
#include <immintrin.h>

#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 12, kNr = 32;

template <int kRows>
void tile_rows(const uint8_t* a, ptrdiff_t lda, const int8_t* w, int groups, int32_t* c, bool accumulate) {
  __m512i acc[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      acc[i][j] = accumulate ? _mm512_loadu_si512(c + kNr * i + 16 * j) : _mm512_setzero_si512();
  for (int g = 0; g < groups; ++g, a += 4, w += 4 * kNr) {
    const __m512i w0 = _mm512_loadu_si512(w);
    const __m512i w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      int32_t group;
      __builtin_memcpy(&group, a + i * lda, 4);
      const __m512i x = _mm512_set1_epi32(group);
      acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], x, w0);
      acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], x, w1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm512_storeu_si512(c + kNr * i + 16 * j, acc[i][j]);
}

}  // namespace

void tile_avx512_vnni(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c,
                      bool accumulate) {
  using Rows = void (*)(const uint8_t*, ptrdiff_t, const int8_t*, int, int32_t*, bool);
  static constexpr Rows table[kMr] = {tile_rows<1>, tile_rows<2>,  tile_rows<3>,  tile_rows<4>,
                                      tile_rows<5>, tile_rows<6>,  tile_rows<7>,  tile_rows<8>,
                                      tile_rows<9>, tile_rows<10>, tile_rows<11>, tile_rows<12>};
  table[rows - 1](a, lda, static_cast<const int8_t*>(panel), length / 4, c, accumulate);
}

const Kernel kAvx512Vnni{"avx512_vnni_12x32", Isa::avx512_vnni, kMr,          kNr, 4, Layout::dot4,
                         quantize_avx512,     tile_avx512_vnni, finish_avx512};

}  // namespace pycompress::int8
