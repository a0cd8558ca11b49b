// AVX-512 VNNI (Cascade Lake, Zen 4 and later): 8 rows x 16 channels, a set of a panel in one register. `vpdpbusd` adds
// four u8 * s8 products straight into 32 bits. Floor: one vpdpbusd per 64 products, two a cycle on Intel servers.
#include "avx2_panel.h"
#include "kernel_list.h"

namespace pycompress::int4 {
namespace {

constexpr int kMr = 8;

template <int kRows>
void tile_rows(const uint8_t* first, ptrdiff_t ldq, const Panel& panel, const Expanded& from, float* v,
               bool accumulate) {
  __m256 acc[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) acc[i][j] = accumulate ? _mm256_loadu_ps(v + i * kPanel + 8 * j) : _mm256_setzero_ps();
  const int8_t* w = from.weights;
  const float* scale = from.scale;
  for (int units = panel.units; units > 0; units -= panel.group_units, scale += kPanel) {
    __m512i dot[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) dot[i] = _mm512_setzero_si512();
    const int sets = kSets * (units < panel.group_units ? units : panel.group_units);
    for (int s = 0; s < sets; ++s, first += 4, w += kSetBytes) {
      const __m512i weights = _mm512_loadu_si512(w);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        __builtin_memcpy(&four, first + i * ldq, 4);
        dot[i] = _mm512_dpbusd_epi32(dot[i], _mm512_set1_epi32(four), weights);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      alignas(64) int32_t sums[kPanel];
      _mm512_storeu_si512(sums, dot[i]);
      acc[i][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load256(sums)), _mm256_loadu_ps(scale), acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load256(sums + 8)), _mm256_loadu_ps(scale + 8), acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(v + i * kPanel + 8 * j, acc[i][j]);
}

void tile(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, const Expanded& from, float* v,
          bool accumulate) {
  static constexpr TileRows table[kMr] = {tile_rows<1>, tile_rows<2>, tile_rows<3>, tile_rows<4>,
                                          tile_rows<5>, tile_rows<6>, tile_rows<7>, tile_rows<8>};
  table[rows - 1](q, ldq, panel, from, v, accumulate);
}

}  // namespace

const Kernel kAvx512Vnni{"avx512_vnni_8x16", Isa::avx512_vnni, kMr, kPanel, 4, expand_avx2, tile, nullptr, finish_avx2};

}  // namespace pycompress::int4
