// AVX-VNNI (Alder Lake, Zen 5 and later): 6 rows x 16 channels. `vpdpbusd` adds four u8 * s8 products straight into 32
// bits. Floor: one vpdpbusd per 32 products, two a cycle.
#include "avx2_panel.h"
#include "kernel_list.h"

namespace pycompress::int4 {
namespace {

constexpr int kMr = 6;

struct Dots {
  template <int kRows, bool kFirst, class Weights>
  static inline __attribute__((always_inline)) void add(const uint8_t* const (&q)[kRows], const Weights& weights,
                                                        __m256i (&dot)[kRows][2]) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; ++s) {
      const __m256i w0 = weights.set(s, 0), w1 = weights.set(s, 1);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256i x = broadcast_four(q[i] + 4 * s), none = _mm256_setzero_si256();
        dot[i][0] = _mm256_dpbusd_avx_epi32(kFirst && s == 0 ? none : dot[i][0], x, w0);
        dot[i][1] = _mm256_dpbusd_avx_epi32(kFirst && s == 0 ? none : dot[i][1], x, w1);
      }
    }
  }
};

template <int kRows, class Weights>
void tile_rows(const uint8_t* q, ptrdiff_t ldq, const Panel& panel, const Expanded& from, float* v, bool accumulate) {
  add_panel<kRows, false, Dots>(q, ldq, panel, Weights(panel, from), v, accumulate);
}

template <class Weights>
constexpr TileRows kTileRows[kMr] = {tile_rows<1, Weights>, tile_rows<2, Weights>, tile_rows<3, Weights>,
                                     tile_rows<4, Weights>, tile_rows<5, Weights>, tile_rows<6, Weights>};

void tile(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, const Expanded& from, float* v,
          bool accumulate) {
  kTileRows<Bytes>[rows - 1](q, ldq, panel, from, v, accumulate);
}

void stream(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, float* v) {
  kTileRows<Nibbles>[rows - 1](q, ldq, panel, {}, v, false);
}

}  // namespace

const Kernel kAvxVnni{"avx_vnni_6x16", Isa::avx_vnni, kMr, kPanel, 4, expand_avx2, tile, stream, finish_avx2};

}  // namespace pycompress::int4
