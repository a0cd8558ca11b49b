// Rows of bfloat16 and float16, for the tests of the kernels for few rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>

#include "../guarded.h"
#include "common/types.h"
#include "emulate.h"

namespace native {

using pycompress::Activation;
using pycompress::Type;

inline size_t size(int64_t count) { return static_cast<size_t>(count); }

inline uint16_t half_bits(double value, Type type) {
  const auto v = static_cast<float>(value);
  return type == Type::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16(v)) : __half_as_ushort(__float2half(v));
}
inline float half_value(uint16_t bits, Type type) {
  return type == Type::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}
inline float bfloat_value(uint16_t bits) { return half_value(bits, Type::bfloat16); }

inline double unit_roundoff(Type type) { return type == Type::bfloat16 ? 0x1p-8 : 0x1p-11; }

// x [m, k] with row stride k + gap, NaN between the rows; aligned to 16 bytes where k + gap is a multiple of 8.
struct HalfRows {
  Type type;
  int64_t m, k, ldx;
  Guarded<uint16_t> data;

  // exact: integers from -8 to 8; else normal.
  HalfRows(Type type_, int64_t m_, int64_t k_, int64_t gap, bool exact)
      : type(type_),
        m(m_),
        k(k_),
        ldx(k_ + gap),
        data(size((m - 1) * ldx + k), Edge::end, tail(ldx, (m - 1) * ldx + k)) {
    std::mt19937 random(static_cast<uint32_t>(m * 17 + k));
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < data.size(); ++i) data[i] = 0xffff;
    for (int64_t row = 0; row < m; ++row)
      for (int64_t i = 0; i < k; ++i)
        data[size(row * ldx + i)] = half_bits(exact ? static_cast<int>(random() % 17) - 8 : normal(random), type);
  }

  double at(int64_t row, int64_t i) const { return static_cast<double>(half_value(data[size(row * ldx + i)], type)); }

  static size_t tail(int64_t ldx, int64_t count) { return ldx % 8 == 0 ? size((8 - count % 8) % 8 * 2) : 0; }
};

}  // namespace native
