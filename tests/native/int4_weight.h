// 4-bit weights for the tests, and what they mean in plain integers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "common/float16.h"
#include "guarded.h"
#include "int4/pack.h"
#include "report.h"

namespace native {

// Values and zero points: anything; all at their highest, at their lowest; lanes of the AVX2 kernels that are just full
// (csrc/int4/gemm.h), of positive weights or of negative ones.
enum class Nibbles { random, highest, lowest, full_positive, full_negative };
constexpr int kNibbles = 5;

// A packed weight between guard pages, its header aligned as the header's fields need it.
struct PackedBytes : Guarded<uint8_t> {
  PackedBytes(const std::vector<uint8_t>& bytes, Edge edge, size_t gap = 0)
      : Guarded(bytes.size(), edge, 8 * gap + (edge == Edge::end ? (8 - bytes.size() % 8) % 8 : 0)) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
};

inline float float_of_bfloat16(uint16_t bits) { return pycompress::to_float(static_cast<uint32_t>(bits) << 16); }

// The canonical weight between guard pages. The nibbles behind the last value and the last zero point of a row are 0.
class Int4Weight {
 public:
  Int4Weight(int channels, int positions, int group_size, bool is_symmetric, Edge edge)
      : n(channels),
        k(positions),
        group(group_size),
        groups((positions + group_size - 1) / group_size),
        symmetric(is_symmetric),
        values(area(channels, bytes_of(positions)), edge),
        scale(area(channels, groups), edge),
        zeros(is_symmetric ? 0 : area(channels, bytes_of(groups)), edge) {
    values.fill(0), zeros.fill(0);
    std::fill_n(scale.data(), scale.size(), uint16_t{0x3f80});  // 1
  }

  void fill(Nibbles kind, std::mt19937& random) {
    const auto any = [&] { return static_cast<int>(random() % 16); };
    for (int row = 0; row < n; ++row) {
      for (int g = 0; g < groups && !symmetric; ++g) {
        const bool is_high = kind == Nibbles::lowest || kind == Nibbles::full_negative;
        set_zero(row, g, kind == Nibbles::random ? any() : is_high ? 15 : 0);
      }
      // Two neighbours, which one lane adds up, are 8 and 8, 5 and 11, ... away from the zero point.
      for (int i = 0; i < k; i += 2) {
        const int away = static_cast<int>(random() % 7), middle = kind == Nibbles::full_positive ? 8 : 7;
        const bool is_full = kind == Nibbles::full_positive || kind == Nibbles::full_negative;
        const int extreme = kind == Nibbles::highest ? 15 : 0;
        for (int j = i; j < std::min(k, i + 2); ++j)
          set(row, j, kind == Nibbles::random ? any() : is_full ? middle + (j == i ? away : -away) : extreme);
      }
    }
  }
  // Any eight bits of fraction; now and then zero or subnormal.
  void fill_scales(std::mt19937& random) {
    for (size_t i = 0; i < scale.size(); ++i) {
      const auto exponent = static_cast<uint32_t>(110 + random() % 15),
                 fraction = static_cast<uint32_t>(random() % 128);
      scale[i] = static_cast<uint16_t>(random() % 29 == 0 ? random() % 3 : exponent << 7 | fraction);
    }
  }

  void set(int row, int i, int value) { put(values[area(row, bytes_of(k)) + size(i / 2)], i % 2 != 0, value); }
  void set_zero(int row, int g, int value) { put(zeros[area(row, bytes_of(groups)) + size(g / 2)], g % 2 != 0, value); }
  int value(int row, int i) const { return get(values[area(row, bytes_of(k)) + size(i / 2)], i % 2 != 0); }
  int zero(int row, int g) const {
    return symmetric ? 8 : get(zeros[area(row, bytes_of(groups)) + size(g / 2)], g % 2 != 0);
  }
  int centred(int row, int i) const { return value(row, i) - zero(row, i / group); }
  float scale_of(int row, int g) const { return float_of_bfloat16(scale[area(row, groups) + size(g)]); }

  std::vector<uint8_t> packed(int activation_bits, int threads = 1) const {
    return pycompress::int4::pack(
        {values.data(), scale.data(), symmetric ? nullptr : zeros.data(), n, k, group, activation_bits}, threads);
  }
  std::string name() const { return text("n=", n, " k=", k, " group=", group, " symmetric=", symmetric); }

  const int n, k, group, groups;
  const bool symmetric;
  Guarded<uint8_t> values;  // [n][ceil(k / 2)]
  Guarded<uint16_t> scale;  // bfloat16 [n][groups]
  Guarded<uint8_t> zeros;   // [n][ceil(groups / 2)], or empty

 private:
  static size_t size(int i) { return static_cast<size_t>(i); }
  static size_t area(int rows, int columns) { return size(rows) * size(columns); }
  static int bytes_of(int nibbles) { return (nibbles + 1) / 2; }
  static int get(uint8_t byte, bool high) { return high ? byte >> 4 : byte & 15; }
  static void put(uint8_t& byte, bool high, int value) {
    byte = static_cast<uint8_t>(high ? (byte & 15) | value << 4 : (byte & 0xf0) | value);
  }
};

}  // namespace native
