// The quantizer and the epilogue of avx2.cpp in 512 bits: the same float32 steps, so the same bits.
#include "../common/avx512_vector.h"
#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

constexpr int kLanes = Vector::kWidth;

inline __mmask16 up_to(int count) { return count >= kLanes ? 0xffff : first_lanes(count); }

// Up to 16 values of a row, zeros behind them.
template <Type kType>
inline __m512 load_values(const void* x, ptrdiff_t i, __mmask16 lanes) {
  if constexpr (kType == Type::float32) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + i);
  if constexpr (kType == Type::bfloat16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  return _mm512_cvtph_ps(half);
}

template <Type kType, bool kFixed>
inline __attribute__((always_inline)) bool quantize_by(const void* x, ptrdiff_t begin, ActivationShape shape, int amax,
                                                       float inverse, int zero, uint8_t* data) {
  const __m512 factor = _mm512_set1_ps(inverse), beyond = _mm512_set1_ps(kBeyond);
  const __m512i shift = _mm512_set1_epi32(zero), top = _mm512_set1_epi32(amax), none = _mm512_setzero_si512();
  __m512 poison = _mm512_setzero_ps();
  for (int block = 0; block < shape.blocks(); ++block) {
    uint8_t* out = data + shape.offset(block);
    const int length = shape.length(block), first = block * kBlockK;
    for (int i = 0; i < length; i += kLanes) {
      const int left = shape.k - first - i;
      const __m512 v = load_values<kType>(x, begin + first + i, left > 0 ? up_to(left) : 0);
      __m512 steps = _mm512_mul_ps(v, factor);
      if constexpr (kFixed) {
        steps = _mm512_min_ps(steps, beyond);  // below, what fits no int gives INT_MIN, so 0
        poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
      }
      __m512i q = _mm512_cvtps_epi32(steps);  // half to even; NaN gives INT_MIN, so 0 below
      q = _mm512_min_epi32(_mm512_max_epi32(_mm512_add_epi32(q, shift), none), top);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(q));
    }
  }
  return !kFixed || _mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q) == 0;
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
void quantize_row(const void* x, ptrdiff_t begin, ActivationShape shape, int amax, uint8_t* data, float* scale,
                  int32_t* zero_point) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 low[2] = {zero, zero}, high[2] = {zero, zero}, poison[2] = {zero, zero};
  for (int i = 0; i < shape.k; i += 2 * kLanes)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int at = i + j * kLanes;
      if (at >= shape.k) break;
      const __m512 v = load_values<kType>(x, begin + at, up_to(shape.k - at));
      low[j] = _mm512_min_ps(low[j], v);
      high[j] = _mm512_max_ps(high[j], v);
      poison[j] = _mm512_fmadd_ps(v, zero, poison[j]);  // 0 where finite, NaN for ever after NaN or Inf
    }
  const __m512 bad = _mm512_add_ps(poison[0], poison[1]);
  const bool finite = _mm512_cmp_ps_mask(bad, bad, _CMP_UNORD_Q) == 0;
  const float least = _mm512_reduce_min_ps(_mm512_min_ps(low[0], low[1]));
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(high[0], high[1]));
  const float half_max = 0.5f * static_cast<float>(amax);
  const float half = 0.5f * most - 0.5f * least;
  float inverse = 0;
  *scale = finite ? 0.0f : __builtin_nanf("");
  if (finite && !(half < 0x1p-100f)) {
    inverse = half_max / half;
    *scale = half / half_max;
  }
  const int rounded = _mm_cvtss_si32(_mm_set_ss(finite ? -least * inverse : 0.0f));
  *zero_point = rounded < 0 ? 0 : rounded > amax ? amax : rounded;
  quantize_by<kType, false>(x, begin, shape, amax, inverse, *zero_point, data);
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

inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}

// `kSums`: there is an addend, or bytes beside y.
template <Type kType, bool kSums = false>
void finish_as(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  const Vector zero = Vector::of(0.0f);
  Vector poison = zero;  // 0 where finite, NaN for ever after NaN or Inf
  const auto put = [&](uint8_t* at, int j, __m128i bytes) {
    if (columns - j >= kLanes)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
    else
      _mm_mask_storeu_epi8(at, up_to(columns - j), bytes);
  };
  for (int j = 0; j < columns; j += kLanes) {
    const __mmask16 lanes = up_to(columns - j);
    const __m512i column_sum = _mm512_loadu_si512(e.column_sum + j);
    const __m512 weight_scale =
        e.weight_scale == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, e.weight_scale + j);
    const __m512 bias = e.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, e.bias + j);
    __m512i correction = _mm512_setzero_si512();
    for (int m = 0; m < rows; ++m) {
      if (m == 0 || e.zero_point[m] != e.zero_point[m - 1])  // often the same, and a product is slow
        correction = _mm512_mullo_epi32(column_sum, _mm512_set1_epi32(e.zero_point[m]));
      const __m512i acc = _mm512_sub_epi32(_mm512_loadu_si512(c + m * nr + j), correction);
      if constexpr (kType == Type::int32) {
        _mm512_mask_storeu_epi32(static_cast<int32_t*>(y) + m * ldy + j, lanes, acc);
        continue;
      }
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(e.row_scale[m]));
      Vector v{_mm512_mul_ps(scaled, weight_scale)};
      if (e.bias_stride != 0)
        v = v + Vector::load(e.bias + m * e.bias_stride + j);
      else if (e.bias != nullptr)
        v = v + Vector{bias};
      if (kSums && e.addend != nullptr) v = v + Vector{_mm512_maskz_loadu_ps(lanes, e.addend + m * ldy + j)};
      if (e.activation != Activation::none) v = activate(e.activation, v);
      if constexpr (kSums) poison = fma(v, zero, poison);
      if (kType == Type::uint8 || (kSums && e.beside != nullptr)) {
        uint8_t* bytes = kType == Type::uint8 ? static_cast<uint8_t*>(y) : e.beside;
        put(bytes + m * ldy + j, j, requantized(v.value, e.to.inverse, e.to.low, e.to.high, e.to.zero_point));
      }
      if constexpr (kType == Type::uint8) {
        continue;
      } else if constexpr (kType == Type::float32) {
        _mm512_mask_storeu_ps(static_cast<float*>(y) + m * ldy + j, lanes, v.value);
      } else {
        __m256i half;
        if constexpr (kType == Type::bfloat16)
          half = to_bfloat16(v.value);
        else
          half = _mm512_cvtps_ph(v.value, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + m * ldy + j, lanes, half);
      }
    }
  }
  if (kSums && e.finite != nullptr && _mm512_cmp_ps_mask(poison.value, poison.value, _CMP_UNORD_Q) != 0)
    *e.finite = false;
}

// Whether all of them are the same bits.
inline bool alike(const void* numbers, int count) {
  const auto* words = static_cast<const int32_t*>(numbers);
  const __m512i first = _mm512_set1_epi32(words[0]);
  for (int i = 0; i < count; i += kLanes) {
    const __mmask16 lanes = up_to(count - i);
    if (_mm512_mask_cmpneq_epi32_mask(lanes, _mm512_maskz_loadu_epi32(lanes, words + i), first) != 0) return false;
  }
  return true;
}

// Bytes of which the lower end is a whole number, as that of a range or of ReLU is: packed with saturation, the ends of
// 64 of them are cut at once.
struct Bytes {
  __m512 inverse, high;
  __m512i zero, low;
  explicit Bytes(const Requantize& to)
      : inverse(_mm512_set1_ps(to.inverse)),
        high(_mm512_set1_ps(to.high)),
        zero(_mm512_set1_epi16(static_cast<int16_t>(to.zero_point))),
        low(_mm512_set1_epi8(static_cast<int8_t>(static_cast<int>(to.low) + to.zero_point))) {}
  static bool fits(const Requantize& to) {
    return to.low == static_cast<float>(static_cast<int>(to.low)) && to.low + static_cast<float>(to.zero_point) >= 0;
  }
  // NaN and what is too low for an int give INT_MIN.
  __m512i rounded(__m512 v) const { return _mm512_cvtps_epi32(_mm512_min_ps(high, _mm512_mul_ps(v, inverse))); }
  template <int kVectors>
  __m512i of(const __m512 (&v)[kVectors]) const {
    const __m512i a = rounded(v[0]), b = rounded(v[1]);
    if constexpr (kVectors == 2)
      return _mm512_max_epu8(bytes_of(a, b, a, b, zero), low);
    else
      return _mm512_max_epu8(bytes_of(a, b, rounded(v[2]), rounded(v[3]), zero), low);
  }
};

// Up to 64 columns or 32, of rows of one scale and zero point: the same steps, with all that the rows share in
// registers.
template <Type kType, int kVectors, bool kCut>
void finish_alike(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  const __m512 row_scale = _mm512_set1_ps(e.row_scale[0]);
  const __m512i zero_point = _mm512_set1_epi32(e.zero_point[0]);
  __m512i correction[kVectors];
  __m512 weight_scale[kVectors], bias[kVectors];
  __mmask16 lanes[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int at = j * kLanes;
    lanes[j] = columns > at ? up_to(columns - at) : 0;
    correction[j] = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(lanes[j], e.column_sum + at), zero_point);
    weight_scale[j] = _mm512_maskz_loadu_ps(lanes[j], e.weight_scale + at);
    bias[j] = _mm512_set1_ps(-0.0f);  // changes no number
    if (e.bias != nullptr) bias[j] = _mm512_maskz_loadu_ps(lanes[j], e.bias + at);
  }
  const __m512 top = _mm512_set1_ps(e.activation == Activation::relu6 ? 6.0f : __builtin_inff());
  const Bytes bytes(e.to);
  const __mmask64 all = columns >= 64 ? ~0ull : (1ull << columns) - 1;
  for (int m = 0; m < rows; ++m, c += nr) {
    __m512 v[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const __m512i acc = _mm512_sub_epi32(_mm512_loadu_si512(c + j * kLanes), correction[j]);
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), row_scale), weight_scale[j]);
      v[j] = _mm512_add_ps(scaled, bias[j]);
      if constexpr (kCut) v[j] = _mm512_min_ps(top, _mm512_max_ps(_mm512_setzero_ps(), v[j]));  // NaN and -0 stay
    }
    if constexpr (kType == Type::uint8) {
      auto* at = static_cast<uint8_t*>(y) + m * ldy;
      const __m512i result = bytes.of(v);
      if (columns == 64)
        _mm512_storeu_si512(at, result);
      else if (columns == 32)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(result));
      else
        _mm512_mask_storeu_epi8(at, all, result);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        _mm512_mask_storeu_ps(static_cast<float*>(y) + m * ldy + j * kLanes, lanes[j], v[j]);
    }
  }
}

// Whether it did.
template <Type kType>
bool finished_alike(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  const bool plain = e.activation == Activation::none;
  const bool cut = e.activation == Activation::relu || e.activation == Activation::relu6;
  if (rows < 2 || nr < 32 || columns > 64 || !(plain || cut) || e.bias_stride != 0 || e.weight_scale == nullptr)
    return false;
  if (kType == Type::uint8 && (cut || !Bytes::fits(e.to))) return false;
  if (e.addend != nullptr || e.beside != nullptr) return false;
  if (!alike(e.row_scale, rows) || !alike(e.zero_point, rows)) return false;
  const auto run = [&](auto narrow, auto wide) {
    return (columns > 32 ? wide : narrow)(c, nr, rows, columns, e, y, ldy);
  };
  if (kType != Type::uint8 && cut)
    run(finish_alike<kType, 2, true>, finish_alike<kType, 4, true>);
  else
    run(finish_alike<kType, 2, false>, finish_alike<kType, 4, false>);
  return true;
}

}  // namespace

void quantize_avx512(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax,
                     const Range* range, uint8_t* data, float* scale, int32_t* zero_point) {
  if (shape.versions != 1) return quantize_avx2(x, type, ldx, rows, shape, amax, range, data, scale, zero_point);
  if (type == Type::float32) quantize_rows<Type::float32>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
  if (type == Type::bfloat16) quantize_rows<Type::bfloat16>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
  if (type == Type::float16) quantize_rows<Type::float16>(x, ldx, rows, shape, amax, range, data, scale, zero_point);
}

void finish_avx512(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  if (e.addend != nullptr || e.beside != nullptr) {
    if (e.type == Type::uint8) return finish_as<Type::uint8, true>(c, nr, rows, columns, e, y, ldy);
    return finish_as<Type::float32, true>(c, nr, rows, columns, e, y, ldy);
  }
  switch (e.type) {
    case Type::float32:
      if (finished_alike<Type::float32>(c, nr, rows, columns, e, y, ldy)) return;
      return finish_as<Type::float32>(c, nr, rows, columns, e, y, ldy);
    case Type::bfloat16:
      return finish_as<Type::bfloat16>(c, nr, rows, columns, e, y, ldy);
    case Type::float16:
      return finish_as<Type::float16>(c, nr, rows, columns, e, y, ldy);
    case Type::int32:
      return finish_as<Type::int32>(c, nr, rows, columns, e, y, ldy);
    case Type::uint8:
      if (finished_alike<Type::uint8>(c, nr, rows, columns, e, y, ldy)) return;
      return finish_as<Type::uint8>(c, nr, rows, columns, e, y, ldy);
  }
}

}  // namespace pycompress::int8
