// What the kernels with 256-bit registers share: packed weights in registers, and the walk over a panel. Everything is
// in an anonymous namespace, because each instruction-set file compiles its own copy and the linker must not merge
// them.
#pragma once

#include "../common/avx2_vector.h"
#include "gemm.h"

namespace pycompress::int4 {
namespace {

constexpr int kSets = kUnit / 4, kSetBytes = 4 * kPanel;

inline __m256 floats_of_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Zero points of a group, each at the four bytes of its channel: channels 0 to 7, and 8 to 15.
inline void zero_points(const uint8_t* zero, __m256i& low, __m256i& high) {
  if (zero == nullptr) {
    low = high = _mm256_set1_epi8(kSymmetricZero);
    return;
  }
  int64_t eight;
  __builtin_memcpy(&eight, zero, 8);
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                          4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  const __m256i both = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), spread), mask = _mm256_set1_epi8(15);
  low = _mm256_and_si256(both, mask);
  high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}

// The same as floats.
inline void zero_points(const uint8_t* zero, __m256& low, __m256& high) {
  __m256i low_bytes, high_bytes;
  zero_points(zero, low_bytes, high_bytes);
  const __m256i mask = _mm256_set1_epi32(15);
  low = _mm256_cvtepi32_ps(_mm256_and_si256(low_bytes, mask));
  high = _mm256_cvtepi32_ps(_mm256_and_si256(high_bytes, mask));
}

// Of a number of rows.
using TileRows = void (*)(const uint8_t*, ptrdiff_t, const Panel&, const Expanded&, float*, bool);

// Where the weights of a unit come from: what expand() wrote, or straight from the nibbles.
struct Bytes {
  const int8_t* w;
  const float* scale;

  Bytes(const Panel&, const Expanded& from) : w(from.weights), scale(from.scale) {}
  void begin_group() {}
  __m256i set(int s, int half) const { return load256(w + s * kSetBytes + 32 * half); }
  void end_unit() { w += kSets * kSetBytes; }
  __m256 scales(int half) const { return _mm256_loadu_ps(scale + 8 * half); }
  void end_group() { scale += kPanel; }
};

struct Nibbles {
  const uint8_t *nibbles, *zero;
  const uint16_t* scale;
  __m256i zeros[2];

  Nibbles(const Panel& panel, const Expanded&) : nibbles(panel.nibbles), zero(panel.zero), scale(panel.scale) {}
  void begin_group() {
    zero_points(zero, zeros[0], zeros[1]);
    if (zero != nullptr) zero += kPanel / 2;
  }
  __m256i set(int s, int half) const {
    const __m256i pair = load256(nibbles + s / 2 * kSetBytes + 32 * half), mask = _mm256_set1_epi8(15);
    return _mm256_sub_epi8(_mm256_and_si256(s % 2 == 0 ? pair : _mm256_srli_epi16(pair, 4), mask), zeros[half]);
  }
  void end_unit() {
    nibbles += kUnitBytes;
    for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(nibbles + kAhead + line);
  }
  __m256 scales(int half) const { return floats_of_bfloat16(scale + 8 * half); }
  void end_group() { scale += kPanel; }
  static constexpr int kAhead = 1024;
};

inline __m256i broadcast_four(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// dot[row][half] (+)= the products of a unit; moves on to the next.
template <int kRows, bool kFirst, class Unit, class Weights>
inline __attribute__((always_inline)) void add_unit(const uint8_t* (&q)[kRows], Weights& weights,
                                                    __m256i (&dot)[kRows][2]) {
  Unit::template add<kRows, kFirst>(q, weights, dot);
  weights.end_unit();
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    q[i] += kUnit;
    asm("" : "+r"(q[i]));  // one pointer a row: g++ would keep their differences instead, in memory
  }
}

// v[kRows][kPanel] (+)= q . panel. Unit::add<kFirst>(q, weights, dot) adds the products of a unit: dot[row][half].
template <int kRows, bool kOneUnit, class Unit, class Weights>
inline __attribute__((always_inline)) void add_panel(const uint8_t* first, ptrdiff_t ldq, const Panel& panel,
                                                     Weights weights, float* v, bool accumulate) {
  const uint8_t* q[kRows];
  __m256 acc[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    q[i] = first + i * ldq;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) acc[i][j] = accumulate ? _mm256_loadu_ps(v + i * kPanel + 8 * j) : _mm256_setzero_ps();
  }
  const int group_units = kOneUnit ? 1 : panel.group_units;
  for (int units = panel.units; units > 0; units -= group_units) {
    __m256i dot[kRows][2];
    weights.begin_group();
    add_unit<kRows, true, Unit>(q, weights, dot);
    for (int u = 1; u < group_units && u < units; ++u) add_unit<kRows, false, Unit>(q, weights, dot);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        acc[i][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][j]), weights.scales(j), acc[i][j]);
    weights.end_group();
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(v + i * kPanel + 8 * j, acc[i][j]);
}

}  // namespace
}  // namespace pycompress::int4
