// The windows layout on AVX2: 4 rows x 16 channels.
#include "../common/avx2_vector.h"
#include "kernel_list.h"
#include "windows.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 4, kNr = 16;

inline __m256i broadcast_window(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i multiply_memory(__m256i a, const uint8_t* w) {  // u8 * s8, the weights as memory operand
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "m"(*reinterpret_cast<const __m256i*>(w)));
  return product;
}

// acc[row][half] += picked activations . weights, for `count` groups of kDepth items. Advances offset and item.
template <int kRows, int kDepth>
inline __attribute__((always_inline)) void run_items(const uint8_t* const (&a)[kMr], uint32_t count,
                                                     const uint16_t*& offset, const uint8_t*& item,
                                                     __m256i (&acc)[kMr][2]) {
  const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
  for (uint32_t group = 0; group < count; ++group) {
    __m256i low[kDepth], high[kDepth];
#pragma GCC unroll 2
    for (int d = 0; d < kDepth; ++d) {
      const __m256i picks = load256(item + kItemBytes * d);
      low[d] = _mm256_and_si256(picks, nibble);
      high[d] = _mm256_and_si256(_mm256_srli_epi16(picks, 4), nibble);
      KEEP_IN_REGISTER(low[d]);
      KEEP_IN_REGISTER(high[d]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      __m256i window = broadcast_window(a[i] + offset[0]);
      __m256i sum0 = multiply_memory(_mm256_shuffle_epi8(window, low[0]), item + 32);
      __m256i sum1 = multiply_memory(_mm256_shuffle_epi8(window, high[0]), item + 64);
      if constexpr (kDepth == 2) {
        window = broadcast_window(a[i] + offset[1]);
        sum0 = _mm256_add_epi16(sum0, multiply_memory(_mm256_shuffle_epi8(window, low[1]), item + kItemBytes + 32));
        KEEP_IN_REGISTER(sum0);
        sum1 = _mm256_add_epi16(sum1, multiply_memory(_mm256_shuffle_epi8(window, high[1]), item + kItemBytes + 64));
        KEEP_IN_REGISTER(sum1);
      }
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(sum0, ones));
      KEEP_IN_REGISTER(acc[i][0]);
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(sum1, ones));
      KEEP_IN_REGISTER(acc[i][1]);
    }
    offset += kDepth;
    item += kItemBytes * kDepth;
  }
}

template <int kRows>
void tile_rows(const uint8_t* a, ptrdiff_t lda, const void* panel, int32_t* c, bool accumulate) {
  const auto* counts = static_cast<const uint32_t*>(panel);
  const auto* offset = reinterpret_cast<const uint16_t*>(counts + 4);
  const uint8_t* item = static_cast<const uint8_t*>(panel) + (16 + 2 * static_cast<size_t>(counts[2]) + 63) / 64 * 64;
  const uint8_t* rows[kMr] = {a, a + lda, a + 2 * lda, a + 3 * lda};
  __m256i acc[kMr][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = accumulate ? load256(c + kNr * i) : _mm256_setzero_si256();
    acc[i][1] = accumulate ? load256(c + kNr * i + 8) : _mm256_setzero_si256();
  }
  run_items<kRows, 2>(rows, counts[0], offset, item, acc);
  run_items<kRows, 1>(rows, counts[1], offset, item, acc);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    store256(c + kNr * i, acc[i][0]);
    store256(c + kNr * i + 8, acc[i][1]);
  }
}

void tile(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int, int32_t* c, bool accumulate) {
  switch (rows) {
    case 1:
      return tile_rows<1>(a, lda, panel, c, accumulate);
    case 2:
      return tile_rows<2>(a, lda, panel, c, accumulate);
    case 3:
      return tile_rows<3>(a, lda, panel, c, accumulate);
    default:
      return tile_rows<4>(a, lda, panel, c, accumulate);
  }
}

}  // namespace

const Kernel kAvx2Windows{"avx2_4x16_windows", Isa::avx2,     kMr,  kNr,        kWindow,
                          Layout::windows,     quantize_avx2, tile, finish_avx2};

}  // namespace pycompress::int8
