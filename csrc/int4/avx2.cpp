// AVX2 without VNNI: 4 rows x 16 channels. The 16-bit sums of a unit stay in eight registers, so that weights are
// loaded once for four rows: 14 loads and 45 other instructions a row and unit. (With the weights as memory operands,
// as in csrc/int8/avx2.cpp, it is 24 and 38: 10 % slower where a neighbour on the core's other thread takes half of the
// L1.)
#include "avx2_panel.h"
#include "kernel_list.h"

namespace pycompress::int4 {
namespace {

constexpr int kMr = 4;

// sum[row][half] (+)= the products of the four positions of a set.
template <int kRows, bool kFirst>
inline __attribute__((always_inline)) void add_set(const uint8_t* const (&q)[kRows], int position, __m256i w0,
                                                   __m256i w1, __m256i (&sum)[kRows][2]) {
  KEEP_IN_REGISTER(w0);
  KEEP_IN_REGISTER(w1);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    __m256i x = broadcast_four(q[i] + position);
    KEEP_IN_REGISTER(x);
    const __m256i p0 = _mm256_maddubs_epi16(x, w0), p1 = _mm256_maddubs_epi16(x, w1);
    sum[i][0] = kFirst ? p0 : _mm256_add_epi16(sum[i][0], p0);
    KEEP_IN_REGISTER(sum[i][0]);
    sum[i][1] = kFirst ? p1 : _mm256_add_epi16(sum[i][1], p1);
    KEEP_IN_REGISTER(sum[i][1]);
  }
}

// A unit in chains of kDepth sets.
template <int kDepth>
struct Chains {
  template <int kRows, bool kFirst, class Weights>
  static inline __attribute__((always_inline)) void add(const uint8_t* const (&q)[kRows], const Weights& weights,
                                                        __m256i (&dot)[kRows][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[kRows][2];
#pragma GCC unroll 8
    for (int s = 0; s < kSets; ++s) {
      if (s % kDepth == 0)
        add_set<kRows, true>(q, 4 * s, weights.set(s, 0), weights.set(s, 1), sum);
      else
        add_set<kRows, false>(q, 4 * s, weights.set(s, 0), weights.set(s, 1), sum);
      if (s % kDepth != kDepth - 1) continue;
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const __m256i wide = _mm256_madd_epi16(sum[i][j], ones);
          dot[i][j] = kFirst && s < kDepth ? wide : _mm256_add_epi32(dot[i][j], wide);
        }
    }
  }
};

template <int kRows, class Weights>
void tile_rows(const uint8_t* q, ptrdiff_t ldq, const Panel& panel, const Expanded& from, float* v, bool accumulate) {
  const Weights weights(panel, from);
  if (!panel.deep)
    add_panel<kRows, false, Chains<4>>(q, ldq, panel, weights, v, accumulate);
  else if (panel.group_units == 1)
    add_panel<kRows, true, Chains<8>>(q, ldq, panel, weights, v, accumulate);
  else
    add_panel<kRows, false, Chains<8>>(q, ldq, panel, weights, v, accumulate);
}

template <class Weights>
constexpr TileRows kTileRows[kMr] = {tile_rows<1, Weights>, tile_rows<2, Weights>, tile_rows<3, Weights>,
                                     tile_rows<4, Weights>};

void tile(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, const Expanded& from, float* v,
          bool accumulate) {
  kTileRows<Bytes>[rows - 1](q, ldq, panel, from, v, accumulate);
}

void stream(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, float* v) {
  kTileRows<Nibbles>[rows - 1](q, ldq, panel, {}, v, false);
}

}  // namespace

void expand_avx2(const Panel& panel, const Expanded& to) {
  const __m256i mask = _mm256_set1_epi8(15);
  const uint8_t *from = panel.nibbles, *zero = panel.zero;
  const uint16_t* scale = panel.scale;
  int8_t* w = to.weights;
  float* scales = to.scale;
  for (int left = panel.units; left > 0; left -= panel.group_units, scale += kPanel, scales += kPanel) {
    __m256i zeros[2];
    zero_points(zero, zeros[0], zeros[1]);
    if (zero != nullptr) zero += kPanel / 2;
    _mm256_storeu_ps(scales, floats_of_bfloat16(scale));
    _mm256_storeu_ps(scales + 8, floats_of_bfloat16(scale + 8));
    const int units = left < panel.group_units ? left : panel.group_units;
    for (int pair = 0; pair < 4 * units; ++pair, from += kSetBytes, w += 2 * kSetBytes)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i v = load256(from + 32 * j);
        store256(w + 32 * j, _mm256_sub_epi8(_mm256_and_si256(v, mask), zeros[j]));
        store256(w + kSetBytes + 32 * j, _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask), zeros[j]));
      }
  }
}

namespace {

// --- epilogue -----------------------------------------------------------------------------------------------------

template <Type kType>
void finish_as(const float* v, int rows, int columns, const Epilogue& e, uint8_t* y, ptrdiff_t ldy) {
  constexpr int size = kType == Type::float32 ? 4 : 2;
  for (int n = 0; n < columns; n += 8) {
    const __m256 offset = _mm256_loadu_ps(e.offset + n);
    const Vector bias{load_floats_up_to(e.bias == nullptr ? nullptr : e.bias + n, columns - n)};
    for (int m = 0; m < rows; ++m) {
      const __m256 zero_point = _mm256_set1_ps(static_cast<float>(e.zero_point[m]));
      const __m256 u = _mm256_fnmadd_ps(zero_point, offset, _mm256_loadu_ps(v + m * kPanel + n));
      Vector r{_mm256_mul_ps(u, _mm256_set1_ps(e.row_scale[m]))};
      if (e.bias_stride != 0)
        r = r + Vector{_mm256_loadu_ps(e.bias + m * e.bias_stride + n)};
      else if (e.bias != nullptr)
        r = r + bias;
      if (e.activation != Activation::none) r = activate(e.activation, r);
      const auto result = converted<kType>(__m256i{}, r.value);
      uint8_t* at = y + (m * ldy + n) * size;
      if (columns - n >= 8)
        __builtin_memcpy(at, &result, sizeof(result));
      else
        __builtin_memcpy(at, &result, static_cast<size_t>((columns - n) * size));
    }
  }
}

}  // namespace

void finish_avx2(const float* v, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  auto* at = static_cast<uint8_t*>(y);
  if (e.type == Type::float32) finish_as<Type::float32>(v, rows, columns, e, at, ldy);
  if (e.type == Type::bfloat16) finish_as<Type::bfloat16>(v, rows, columns, e, at, ldy);
  if (e.type == Type::float16) finish_as<Type::float16>(v, rows, columns, e, at, ldy);
}

const Kernel kAvx2{"avx2_4x16_d8", Isa::avx2, kMr, kPanel, 4, expand_avx2, tile, stream, finish_avx2};

}  // namespace pycompress::int4
