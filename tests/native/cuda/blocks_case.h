// A block sparse weight, rows of x, and what their product must be.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../guarded.h"
#include "../report.h"
#include "halves.h"
#include "int8/kernel_list.h"
#include "sparse/blocks/cuda.h"

namespace native {

namespace blocks = pycompress::sparse::cuda::blocks;
using pycompress::sparse::cuda::bytes_of;
using pycompress::sparse::cuda::Element;

enum class Present { none, all, half, uneven };  // uneven: the first rows of blocks have none, the last have all
enum class Content { integers, extremes, reals };

// Packed on guarded memory. Of a present block, one weight in four is missing.
struct BlockWeight {
  blocks::Shape shape;
  std::vector<uint8_t> mask, values;
  std::vector<double> dense;
  Guarded<uint8_t> packed;

  BlockWeight(const blocks::Shape& of, Present present, Content content)
      : shape(of),
        mask(size(of.n * ((of.k + 7) / 8))),
        dense(size(of.n * of.k)),
        packed(fill(present, content).size(), Edge::begin) {
    const blocks::Packed made = pack();
    shape = made.shape;
    std::copy(made.bytes.begin(), made.bytes.end(), packed.data());
  }

  int64_t count() const { return static_cast<int64_t>(values.size()) / bytes_of(shape.element); }
  std::string name() const {
    return text("element=", static_cast<int>(shape.element), " size=", shape.size, " n=", shape.n, " k=", shape.k);
  }

 private:
  blocks::Packed pack() const {
    return blocks::pack(mask.data(), values.data(), count(), shape.element, shape.size, shape.n, shape.k);
  }

  std::vector<uint8_t> fill(Present present, Content content) {
    std::mt19937 random(static_cast<uint32_t>(shape.n * 7919 + shape.k * 31 + shape.size));
    const int64_t down = (shape.n + shape.size - 1) / shape.size, across = (shape.k + shape.size - 1) / shape.size;
    std::vector<bool> there;
    for (int64_t i = 0; i < down * across; ++i) {
      const auto share = static_cast<double>(present == Present::half ? 1 : i / across) /
                         (present == Present::half ? 2 : static_cast<double>(std::max<int64_t>(1, down - 1)));
      there.push_back(present == Present::all ||
                      (present != Present::none && static_cast<double>(random() % 1000) < share * 1000));
    }
    for (int64_t row = 0; row < shape.n; ++row)
      for (int64_t i = 0; i < shape.k; ++i)
        if (there[size(row / shape.size * across + i / shape.size)] && random() % 4 != 0) add(row, i, content, random);
    return pack().bytes;
  }

  void add(int64_t row, int64_t i, Content content, std::mt19937& random) {
    mask[size(row * ((shape.k + 7) / 8) + i / 8)] |= static_cast<uint8_t>(1 << i % 8);
    const int integer =
        content == Content::extremes ? (random() % 2 ? 127 : -127) : static_cast<int>(random() % 255) - 127;
    double& value = dense[size(row * shape.k + i)];
    if (shape.element == Element::int8) {
      values.push_back(static_cast<uint8_t>(integer));
      value = integer;
      return;
    }
    const Type type = type_of(shape.element);
    const uint16_t bits =
        half_bits(content == Content::reals ? std::normal_distribution<double>()(random) : integer, type);
    values.push_back(static_cast<uint8_t>(bits));
    values.push_back(static_cast<uint8_t>(bits >> 8));
    value = static_cast<double>(half_value(bits, type));
  }
};

// Both kinds of rows; those that the weight wants count.
struct BlockCase {
  BlockWeight weight;
  int64_t m;
  HalfRows x;
  Guarded<int8_t> s;
  Guarded<float> row_scale, scale, bias;
  Guarded<int32_t> zero_point;

  BlockCase(const blocks::Shape& shape, int64_t m_, Present present, Content content = Content::integers)
      : weight(shape, present, content),
        m(m_),
        x(is_int8() ? Type::bfloat16 : type_of(shape.element), m, shape.k, 8 + (8 - shape.k % 8) % 8,
          content != Content::reals),
        s(size(m * k_pad())),
        row_scale(size(m)),
        scale(size(shape.n)),
        bias(size(shape.n)),
        zero_point(size(m)) {
    std::mt19937 random(static_cast<uint32_t>(m * 17 + shape.n));
    const bool extreme = content == Content::extremes;
    for (size_t i = 0; i < s.size(); ++i) s[i] = static_cast<int8_t>(extreme ? (random() % 2 ? 127 : -128) : random());
    for (size_t i = 0; i < row_scale.size(); ++i) {
      row_scale[i] = static_cast<float>(random() % 1000) * 1e-4f;
      zero_point[i] = static_cast<int32_t>(extreme ? random() % 2 * 255 : random() % 256);
    }
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<float>(random() % 1000) * 1e-4f;
      bias[i] = static_cast<float>(static_cast<int>(random() % 37) - 18) * 0.25f;
    }
  }

  bool is_int8() const { return weight.shape.element == Element::int8; }
  int64_t k_pad() const { return (weight.shape.k + 63) / 64 * 64; }
  std::string name() const { return text(weight.name(), " m=", m); }

  blocks::Problem problem(void* y, Type type) {
    blocks::Problem p{};
    p.x = x.data.data(), p.ldx = x.ldx;
    p.rows = {s.data(), row_scale.data(), zero_point.data()};
    p.m = m, p.shape = weight.shape;
    p.packed = weight.packed.data();
    p.scale = is_int8() && type != Type::int32 ? scale.data() : nullptr;
    p.y = y, p.y_type = type;
    return p;
  }

  // The sum, and that of the products' magnitudes.
  double sum(int64_t row, int64_t channel, double* magnitude = nullptr) const {
    double total = 0, absolute = 0;
    for (int64_t i = 0; i < weight.shape.k; ++i) {
      const double w = weight.dense[size(channel * weight.shape.k + i)];
      if (w == 0) continue;
      const double value = is_int8() ? s[size(row * k_pad() + i)] + 128 - zero_point[size(row)] : x.at(row, i);
      total += value * w;
      absolute += std::fabs(value * w);
    }
    if (magnitude != nullptr) *magnitude = absolute;
    return total;  // exact for integers: below 2^53
  }
};

}  // namespace native
