// AVX2 without VNNI (Haswell ... Zen 3): 4 rows x 16 channels, chains of depth 4, 2 and 1 (pack.h).
//
// Floor on Zen 3, per 32 products: `vpmaddubsw` and `vpmaddwd` share two pipes, so depth d costs (d + 1) / 2d of a
// cycle: 64 (d=4: 51, d=2: 43, d=1: 32) products a cycle at most, beside 16 of fp32 FMA. Loads and broadcasts take the
// other pipes.
#include <immintrin.h>

#include "../common/avx2_vector.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::int8 {
namespace {

constexpr int kMr = 4, kNr = 16, kGroupBytes = 4 * kNr;

inline __m256i broadcast_group(const uint8_t* p) {
  int32_t group;
  __builtin_memcpy(&group, p, 4);
  return _mm256_set1_epi32(group);
}

// u8 * s8 with the weights as memory operand: one register pair of weights (group 0) is all that there is room for.
inline __m256i multiply_memory(__m256i a, const int8_t* w) {
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "m"(*reinterpret_cast<const __m256i*>(w)));
  return product;
}

// All chains of one depth: acc[row][half] += activations . weights. Advances offset and w past them.
template <int kRows, int kDepth>
inline __attribute__((always_inline)) void run_chains(const uint8_t* const (&a)[kMr], uint32_t chains,
                                                      const uint16_t*& offset, const int8_t*& w,
                                                      __m256i (&acc)[kMr][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (uint32_t chain = 0; chain < chains; ++chain) {
    __m256i w0 = load256(w), w1 = load256(w + 32);
    KEEP_IN_REGISTER(w0);
    KEEP_IN_REGISTER(w1);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      __m256i group = broadcast_group(a[i] + offset[0]);
      __m256i sum0 = _mm256_maddubs_epi16(group, w0), sum1 = _mm256_maddubs_epi16(group, w1);
#pragma GCC unroll 4
      for (int d = 1; d < kDepth; ++d) {
        group = broadcast_group(a[i] + offset[d]);
        sum0 = _mm256_add_epi16(sum0, multiply_memory(group, w + kGroupBytes * d));
        KEEP_IN_REGISTER(sum0);
        sum1 = _mm256_add_epi16(sum1, multiply_memory(group, w + kGroupBytes * d + 32));
        KEEP_IN_REGISTER(sum1);
      }
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(sum0, ones));
      KEEP_IN_REGISTER(acc[i][0]);
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(sum1, ones));
      KEEP_IN_REGISTER(acc[i][1]);
    }
    offset += kDepth;
    w += kGroupBytes * kDepth;
  }
}

template <int kRows>
void tile_rows(const uint8_t* a, ptrdiff_t lda, const void* panel, int32_t* c, bool accumulate) {
  const uint32_t* chains = static_cast<const uint32_t*>(panel);
  const uint16_t* offset = reinterpret_cast<const uint16_t*>(chains + 4);
  const int8_t* w = static_cast<const int8_t*>(panel) + (16 + 2 * static_cast<size_t>(chains[3]) + 63) / 64 * 64;
  const uint8_t* rows[kMr] = {a, a + lda, a + 2 * lda, a + 3 * lda};
  __m256i acc[kMr][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = accumulate ? load256(c + kNr * i) : _mm256_setzero_si256();
    acc[i][1] = accumulate ? load256(c + kNr * i + 8) : _mm256_setzero_si256();
  }
  run_chains<kRows, 4>(rows, chains[0], offset, w, acc);
  run_chains<kRows, 2>(rows, chains[1], offset, w, acc);
  run_chains<kRows, 1>(rows, chains[2], offset, w, acc);
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

// --- quantize -----------------------------------------------------------------------------------------------------

inline float reduce(__m256 v, bool maximum) {
  const __m128 high = _mm256_extractf128_ps(v, 1), low = _mm256_castps256_ps128(v);
  __m128 r = maximum ? _mm_max_ps(low, high) : _mm_min_ps(low, high);
  __m128 s = _mm_movehl_ps(r, r);
  r = maximum ? _mm_max_ps(r, s) : _mm_min_ps(r, s);
  s = _mm_shuffle_ps(r, r, 1);
  return _mm_cvtss_f32(maximum ? _mm_max_ps(r, s) : _mm_min_ps(r, s));
}

struct Ends {
  float low, high;
  bool finite;
};

template <Type kType>
Ends ends_of(const void* x, ptrdiff_t begin, int k) {
  __m256 low = _mm256_setzero_ps(), high = low, low2 = low, high2 = low, poison = low, poison2 = low;
  const __m256 zero = low;
  int i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m256 v = load_floats<kType>(x, begin + i), u = load_floats<kType>(x, begin + i + 8);
    low = _mm256_min_ps(low, v);
    low2 = _mm256_min_ps(low2, u);
    high = _mm256_max_ps(high, v);
    high2 = _mm256_max_ps(high2, u);
    poison = _mm256_fmadd_ps(v, zero, poison);  // 0 where finite, NaN for ever after NaN or Inf
    poison2 = _mm256_fmadd_ps(u, zero, poison2);
  }
  for (; i < k; i += 8) {
    const __m256 v = i + 8 <= k ? load_floats<kType>(x, begin + i) : load_tail<kType>(x, begin + i, k - i);
    low = _mm256_min_ps(low, v);
    high = _mm256_max_ps(high, v);
    poison = _mm256_fmadd_ps(v, zero, poison);
  }
  poison = _mm256_add_ps(poison, poison2);
  const bool finite = _mm256_movemask_ps(_mm256_cmp_ps(poison, poison, _CMP_UNORD_Q)) == 0;
  return {reduce(_mm256_min_ps(low, low2), false), reduce(_mm256_max_ps(high, high2), true), finite};
}

// q of a row, and whether it is finite: nobody has looked at it yet where kFixed.
template <Type kType, bool kFixed>
inline __attribute__((always_inline)) bool quantize_by(const void* x, ptrdiff_t begin, ActivationShape shape, int amax,
                                                       float inverse, int zero, uint8_t* data) {
  const __m256 factor = _mm256_set1_ps(inverse), beyond = _mm256_set1_ps(kBeyond);
  __m256 poison[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  const __m256i shift = _mm256_set1_epi16(static_cast<short>(zero)), top = _mm256_set1_epi8(static_cast<char>(amax));
  const __m256i unlace = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the in-lane packs
  const __m256i order1 =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  const __m256i order2 =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10, 12, 15, 13, 14));
  for (int block = 0; block < shape.blocks(); ++block) {
    uint8_t* out = data + shape.offset(block);
    const int length = shape.length(block), first = block * kBlockK;
    for (int i = 0; i < length; i += 32) {
      __m256i q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int at = first + i + 8 * j, left = shape.k - at;
        const __m256 v = left >= 8  ? load_floats<kType>(x, begin + at)
                         : left > 0 ? load_tail<kType>(x, begin + at, left)
                                    : _mm256_setzero_ps();
        __m256 steps = _mm256_mul_ps(v, factor);
        if constexpr (kFixed) {
          steps = _mm256_min_ps(steps, beyond);  // below, what fits no int gives INT_MIN, so 0
          poison[j] = _mm256_fmadd_ps(v, _mm256_setzero_ps(), poison[j]);
        }
        q[j] = _mm256_cvtps_epi32(steps);  // half to even; NaN gives INT_MIN, so 0 below
      }
      const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(q[0], q[1]), shift);
      const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(q[2], q[3]), shift);
      __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), unlace);
      bytes = _mm256_min_epu8(bytes, top);
      store256(out + i, bytes);
      if (shape.versions == kVersions) {
        store256(out + length + i, _mm256_shuffle_epi8(bytes, order1));
        store256(out + 2 * length + i, _mm256_shuffle_epi8(bytes, order2));
      }
    }
  }
  const __m256 any = _mm256_add_ps(_mm256_add_ps(poison[0], poison[1]), _mm256_add_ps(poison[2], poison[3]));
  return !kFixed || _mm256_movemask_ps(_mm256_cmp_ps(any, any, _CMP_UNORD_Q)) == 0;
}

template <Type kType>
void quantize_row(const void* x, ptrdiff_t begin, ActivationShape shape, int amax, uint8_t* data, float* scale,
                  int32_t* zero_point) {
  const Ends ends = ends_of<kType>(x, begin, shape.k);
  const float half_max = 0.5f * static_cast<float>(amax);
  const float half = 0.5f * ends.high - 0.5f * ends.low;
  float inverse = 0;
  *scale = ends.finite ? 0.0f : __builtin_nanf("");
  if (ends.finite && !(half < 0x1p-100f)) {
    inverse = half_max / half;
    *scale = half / half_max;
  }
  const int rounded = _mm_cvtss_si32(_mm_set_ss(ends.finite ? -ends.low * inverse : 0.0f));
  *zero_point = rounded < 0 ? 0 : rounded > amax ? amax : rounded;
  quantize_by<kType, false>(x, begin, shape, amax, inverse, *zero_point, data);
}

template <Type kType>
void quantize_row(const void* x, ptrdiff_t begin, ActivationShape shape, int amax, const Range& range, uint8_t* data,
                  float* scale, int32_t* zero_point) {
  const float inverse = 1.0f / range.scale;
  const bool finite = quantize_by<kType, true>(x, begin, shape, amax, inverse, range.zero_point, data);
  *scale = finite ? range.scale : __builtin_nanf("");
  *zero_point = range.zero_point;
  if (!finite) __builtin_memset(data, range.zero_point, static_cast<size_t>(shape.stride()));
}

template <Type kType>
void quantize_rows(const void* x, ptrdiff_t ldx, int rows, ActivationShape shape, int amax, const Range* range,
                   uint8_t* data, float* scale, int32_t* zero_point) {
  for (int m = 0; m < rows; ++m, data += shape.stride()) {
    if (range == nullptr)
      quantize_row<kType>(x, m * ldx, shape, amax, data, scale + m, zero_point + m);
    else
      quantize_row<kType>(x, m * ldx, shape, amax, *range, data, scale + m, zero_point + m);
  }
}

// --- epilogue -----------------------------------------------------------------------------------------------------

// kVectors * 8 channels at a time, so that a row's results fill whole cache lines at once.
// `kSums`: there is an addend, or bytes beside y.
template <Type kType, int kVectors, bool kSums>
inline void finish_columns(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, uint8_t* y,
                           ptrdiff_t ldy) {
  constexpr int size = size_of(kType);
  __m256i column_sum[kVectors];
  __m256 weight_scale[kVectors], bias[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    column_sum[j] = load256(e.column_sum + 8 * j);
    weight_scale[j] = load_floats_up_to(e.weight_scale == nullptr ? nullptr : e.weight_scale + 8 * j, columns - 8 * j);
    bias[j] = load_floats_up_to(e.bias == nullptr ? nullptr : e.bias + 8 * j, columns - 8 * j);
  }
  __m256i correction[kVectors];
  const Vector zero = Vector::of(0.0f);
  Vector poison = zero;  // 0 where finite, NaN for ever after NaN or Inf
  for (int m = 0; m < rows; ++m) {
    if (m == 0 || e.zero_point[m] != e.zero_point[m - 1])  // often the same: a product takes longer than all the rest
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j)
        correction[j] = _mm256_mullo_epi32(column_sum[j], _mm256_set1_epi32(e.zero_point[m]));
    const __m256 row_scale = _mm256_set1_ps(e.row_scale[m]);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const __m256i acc = _mm256_sub_epi32(load256(c + m * nr + 8 * j), correction[j]);
      Vector v{_mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(acc), row_scale), weight_scale[j])};
      if (e.bias_stride != 0)
        v = v + Vector{_mm256_loadu_ps(e.bias + m * e.bias_stride + 8 * j)};
      else if (e.bias != nullptr)
        v = v + Vector{bias[j]};
      if (kSums && e.addend != nullptr) v = v + load_up_to(e.addend + m * ldy + 8 * j, columns - 8 * j);
      if (e.activation != Activation::none) v = activate(e.activation, v);
      if constexpr (kSums) poison = fma(v, zero, poison);
      if (kSums && e.beside != nullptr) {
        const int64_t bytes = requantized(v.value, e.to.inverse, e.to.low, e.to.high, e.to.zero_point);
        const size_t count = columns - 8 * j >= 8 ? 8 : columns - 8 * j > 0 ? static_cast<size_t>(columns - 8 * j) : 0;
        __builtin_memcpy(e.beside + m * ldy + 8 * j, &bytes, count);
      }
      const auto result = [&] {
        if constexpr (kType == Type::uint8)
          return requantized(v.value, e.to.inverse, e.to.low, e.to.high, e.to.zero_point);
        if constexpr (kType != Type::uint8) return converted<kType>(acc, v.value);
      }();
      uint8_t* at = y + (m * ldy + 8 * j) * size;
      if (columns - 8 * j >= 8) {
        __builtin_memcpy(at, &result, sizeof(result));
      } else {
        unsigned char buffer[sizeof(result)];
        __builtin_memcpy(buffer, &result, sizeof(result));
        for (int byte = 0; byte < (columns - 8 * j) * size; ++byte) at[byte] = buffer[byte];
      }
    }
  }
  if (kSums && e.finite != nullptr && _mm256_movemask_ps(_mm256_cmp_ps(poison.value, poison.value, _CMP_UNORD_Q)) != 0)
    *e.finite = false;
}

template <Type kType, bool kSums = false>
void finish_as(const int32_t* c, int nr, int rows, int columns, Epilogue e, void* y, ptrdiff_t ldy) {
  constexpr int size = size_of(kType);
  auto* at = static_cast<uint8_t*>(y);
  while (columns > 0) {
    const int step = columns > 8 ? 16 : 8;
    if (step == 16)
      finish_columns<kType, 2, kSums>(c, nr, rows, columns, e, at, ldy);
    else
      finish_columns<kType, 1, kSums>(c, nr, rows, columns, e, at, ldy);
    c += step;
    at += step * size;
    columns -= step;
    e.column_sum += step;
    if (e.weight_scale != nullptr) e.weight_scale += step;
    if (e.bias != nullptr) e.bias += step;
    if (e.addend != nullptr) e.addend += step;
    if (e.beside != nullptr) e.beside += step;
  }
}

}  // namespace

void quantize_avx2(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax,
                   const Range* range, uint8_t* data, float* scale, int32_t* zero_point) {
  if (type == Type::float32) quantize_rows<Type::float32>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
  if (type == Type::bfloat16) quantize_rows<Type::bfloat16>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
  if (type == Type::float16) quantize_rows<Type::float16>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
}

void finish_avx2(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  if (e.addend != nullptr || e.beside != nullptr) {
    if (e.type == Type::uint8) return finish_as<Type::uint8, true>(c, nr, rows, columns, e, y, ldy);
    return finish_as<Type::float32, true>(c, nr, rows, columns, e, y, ldy);
  }
  switch (e.type) {
    case Type::float32:
      return finish_as<Type::float32>(c, nr, rows, columns, e, y, ldy);
    case Type::bfloat16:
      return finish_as<Type::bfloat16>(c, nr, rows, columns, e, y, ldy);
    case Type::float16:
      return finish_as<Type::float16>(c, nr, rows, columns, e, y, ldy);
    case Type::int32:
      return finish_as<Type::int32>(c, nr, rows, columns, e, y, ldy);
    case Type::uint8:
      return finish_as<Type::uint8>(c, nr, rows, columns, e, y, ldy);
  }
}

const Kernel kAvx2{"avx2_4x16_d4", Isa::avx2, kMr, kNr, 4, Layout::chains, quantize_avx2, tile, finish_avx2};

}  // namespace pycompress::int8
