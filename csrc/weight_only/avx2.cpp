// AVX2: from integers to floats, 8 channels at a time.
#include "../int4/avx2_panel.h"
#include "kernel_list.h"

namespace pycompress::weight_only {
namespace {

void expand_int8(const int8_t* panel, int positions, float* to) {
  for (int i = 0; i < positions * kPanel; i += 8) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel + i));
    _mm256_storeu_ps(to + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
  }
}

// 32 bytes hold two sets of four positions for 8 channels: position p of set h is bits 8p + 4h of each 32-bit lane.
void expand_int4(const int4::Panel& panel, float* to) {
  const __m256i mask = _mm256_set1_epi32(15);
  const uint8_t *from = panel.nibbles, *zero = panel.zero;
  const uint16_t* scale = panel.scale;
  for (int left = panel.units; left > 0; left -= panel.group_units, scale += kPanel) {
    __m256 zeros[2], scales[2];
    int4::zero_points(zero, zeros[0], zeros[1]);
    if (zero != nullptr) zero += kPanel / 2;
    for (int j = 0; j < 2; ++j) {
      scales[j] = int4::floats_of_bfloat16(scale + 8 * j);
      zeros[j] = _mm256_mul_ps(zeros[j], scales[j]);  // exact, and so is value * scale - zero * scale
    }
    const int pairs = 4 * (left < panel.group_units ? left : panel.group_units);
    for (int pair = 0; pair < pairs; ++pair, from += 4 * kPanel, to += 8 * kPanel)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i bytes = load256(from + 32 * j);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m256i value = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * (i % 4) + 4 * (i / 4)), mask);
          _mm256_storeu_ps(to + i * kPanel + 8 * j, _mm256_fmsub_ps(_mm256_cvtepi32_ps(value), scales[j], zeros[j]));
        }
      }
  }
}

}  // namespace

const Kernel kAvx2{"avx2_16", Isa::avx2, 1, kPanel, 1, expand_int8, expand_int4};

}  // namespace pycompress::weight_only
