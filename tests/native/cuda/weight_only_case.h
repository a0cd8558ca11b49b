// A random weight-only problem on guarded memory, and its results in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../guarded.h"
#include "../report.h"
#include "emulate.h"
#include "halves.h"
#include "weight_only/cuda.h"

namespace native {

namespace weight_only = pycompress::weight_only::cuda;
using weight_only::Bits;

// A canonical weight and the same packed by the device's packer.
struct PackedWeight {
  weight_only::Packed shape;
  std::vector<uint8_t> values, zero_point;
  std::vector<uint16_t> scale;
  Guarded<uint8_t> packed;
  int32_t refused = 0;

  // exact: scales are powers of two, so that float32 sums of small integers are exact.
  PackedWeight(weight_only::Packed of, bool exact) : shape(of), packed(size(of.bytes()), Edge::begin) {
    std::mt19937 random(static_cast<uint32_t>(of.n * 7919 + of.k * 31 + of.group + of.symmetric));
    values.resize(size(of.n * row_bytes()));
    for (uint8_t& value : values) value = static_cast<uint8_t>(random());
    if (of.bits == Bits::eight)
      for (uint8_t& value : values) value = value == 128 ? 129 : value;
    else if (of.k % 2 != 0)
      for (int64_t n = 0; n < of.n; ++n) values[size(n * row_bytes() + row_bytes() - 1)] &= 15;
    for (int64_t i = 0; i < of.n * of.groups(); ++i) {
      const float power = std::ldexp(1.0f, static_cast<int>(random() % 4) - 3);
      scale.push_back(half_bits(exact ? power : 0.01 + static_cast<double>(random() % 1000) * 1e-4, Type::bfloat16));
    }
    if (of.bits == Bits::four && !of.symmetric) {
      const int64_t row = (of.groups() + 1) / 2;
      zero_point.resize(size(of.n * row));
      for (int64_t i = 0; i < of.n * row; ++i)
        zero_point[size(i)] = static_cast<uint8_t>(random() & (of.groups() % 2 != 0 && i % row == row - 1 ? 15 : 255));
    }
    packed.fill(emulate::kPoison);
    weight_only::pack({values.data(), scale.data(), of.symmetric ? nullptr : zero_point.data()}, of, packed.data(),
                      &refused, nullptr);
  }

  int64_t row_bytes() const { return shape.bits == Bits::eight ? shape.k : (shape.k + 1) / 2; }
  static int nibble(const uint8_t* row, int64_t i) { return row[i / 2] >> i % 2 * 4 & 15; }

  // Without the scale of a channel that int8 has.
  double weight(int64_t n, int64_t k) const {
    const uint8_t* row = values.data() + n * row_bytes();
    if (shape.bits == Bits::eight) return static_cast<int8_t>(row[k]);
    const int64_t group = k / shape.group;
    const int zero = shape.symmetric ? 8 : nibble(zero_point.data() + n * ((shape.groups() + 1) / 2), group);
    return (nibble(row, k) - zero) * static_cast<double>(bfloat_value(scale[size(n * shape.groups() + group)]));
  }
};

struct WeightOnlyCase {
  PackedWeight weight;
  HalfRows x;
  std::vector<float> scale, bias;

  WeightOnlyCase(weight_only::Packed shape, Type type, int64_t m, int64_t gap, bool exact)
      : weight(shape, exact), x(type, m, shape.k, gap, exact) {
    std::mt19937 random(static_cast<uint32_t>(m * 5 + shape.n));
    for (int64_t n = 0; n < shape.n; ++n) {
      scale.push_back(exact ? std::ldexp(1.0f, static_cast<int>(random() % 4) - 3) : 0.01f + static_cast<float>(n % 7));
      bias.push_back(static_cast<float>(static_cast<int>(random() % 200) - 100) * 0.125f);
    }
  }

  // Poisoned before; what surrounds y and the workspace is checked.
  std::vector<uint16_t> run(const weight_only::Plan& plan, Activation activation, bool with_bias) {
    const weight_only::Packed& shape = weight.shape;
    Guarded<uint16_t> y(size(x.m * shape.n));
    Guarded<float> workspace(size(plan.workspace / 4));
    y.fill(emulate::kPoison), workspace.fill(emulate::kPoison);
    weight_only::linear({x.data.data(), x.type, x.m, x.ldx, weight.packed.data(), shape,
                         shape.bits == Bits::eight ? scale.data() : nullptr, with_bias ? bias.data() : nullptr,
                         activation, y.data(), workspace.data(), nullptr},
                        plan);
    expect(y.intact() && workspace.intact(), "a store outside");
    return {y.data(), y.data() + y.size()};
  }

  // The exact result before the activation, and the sum of the magnitudes of what is added.
  double exact(int64_t row, int64_t n, bool with_bias, double* magnitude) const {
    double sum = 0;
    *magnitude = 0;
    for (int64_t k = 0; k < weight.shape.k; ++k) {
      const double product = x.at(row, k) * weight.weight(n, k);
      sum += product;
      *magnitude += std::fabs(product);
    }
    const double factor = weight.shape.bits == Bits::eight ? static_cast<double>(scale[size(n)]) : 1;
    *magnitude *= factor;
    return sum * factor + (with_bias ? static_cast<double>(bias[size(n)]) : 0);
  }
};

}  // namespace native
