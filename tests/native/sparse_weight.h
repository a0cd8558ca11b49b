// Sparse weights and activations for the tests, and what the op means in plain arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/float16.h"
#include "guarded.h"
#include "report.h"
#include "sparse/gemm.h"
#include "sparse/pack.h"

namespace native {

using pycompress::Type;
using pycompress::sparse::Format;

// Which weights stay: blocks of `rows` x `columns`, each with probability `density`, or `keep` of each `of`
// consecutive ones. Uneven: most channels have few weights or none, some all.
struct Mask {
  int rows = 1, columns = 1;
  double density = 1;
  int keep = 0, of = 0;
  bool uneven = false;
  std::string name() const {
    if (of > 0) return text(keep, ":", of);
    return text(rows, "x", columns, " density=", density, uneven ? " uneven" : "");
  }
};

enum class Values { gaussian, uniform, extreme, runs, border };
constexpr int kValues = 5;
inline const char* name_of(Values values) {
  constexpr const char* kNames[] = {"gaussian", "uniform", "extreme", "runs", "border"};
  return kNames[static_cast<int>(values)];
}

inline bool at_their_largest(Values values) { return values == Values::runs || values == Values::border; }

// The canonical weight, and the same as lists of positions.
struct Weight {
  int n, k;
  std::vector<uint8_t> mask;  // [n, ceil(k / 8)]
  std::vector<float> floats;  // [nonzeros]; for the int8 formats the same numbers as in `ints`
  std::vector<int8_t> ints;
  std::vector<size_t> rows;     // [n + 1]: where the weights of a channel begin
  std::vector<size_t> columns;  // [nonzeros]: position of each
  size_t nonzeros() const { return floats.size(); }
};

inline std::vector<uint8_t> kept(int n, int k, const Mask& mask, std::mt19937& random) {
  std::vector<uint8_t> keep(static_cast<size_t>(n) * static_cast<size_t>(k), 0);
  const auto at = [&](int row, int i) -> uint8_t& { return keep[static_cast<size_t>(row * k + i)]; };
  std::uniform_real_distribution<double> uniform;
  if (mask.of > 0) {
    std::vector<int> order(static_cast<size_t>(mask.of));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    for (int row = 0; row < n; ++row)
      for (int begin = 0; begin < k; begin += mask.of) {
        std::shuffle(order.begin(), order.end(), random);
        for (size_t i = 0; i < static_cast<size_t>(mask.keep); ++i)
          if (begin + order[i] < k) at(row, begin + order[i]) = 1;
      }
    return keep;
  }
  for (int first = 0; first < n; first += mask.rows) {
    const double density = !mask.uneven ? mask.density : first % 7 == 3 ? 1.0 : first % 3 == 0 ? 0.0 : mask.density;
    for (int begin = 0; begin < k; begin += mask.columns) {
      if (uniform(random) >= density) continue;
      for (int row = first; row < std::min(n, first + mask.rows); ++row)
        for (int i = begin; i < std::min(k, begin + mask.columns); ++i) at(row, i) = 1;
    }
  }
  return keep;
}

inline int int8_value(Values values, size_t i, std::mt19937& random) {
  int value = std::uniform_int_distribution<int>(-127, 127)(random);
  if (values == Values::gaussian) value = static_cast<int>(std::lrintf(std::normal_distribution<float>()(random) * 38));
  if (values == Values::extreme) value = random() % 2 ? 127 : -127;
  if (values == Values::runs) value = i / 64 % 2 ? 127 : -127;  // whole lanes of one sign: the worst for 16 bits
  if (values == Values::border) {  // two, four or eight of one sign add up to just what a lane holds, or one more
    constexpr int kBorder[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 127};
    value = kBorder[random() % 13] * (i / 64 % 2 ? 1 : -1);
  }
  return value == 0 ? 1 : std::clamp(value, -127, 127);
}

inline Weight make_weight(int n, int k, const Mask& mask, Values values, bool is_float, std::mt19937& random) {
  Weight w{n, k, {}, {}, {}, {0}, {}};
  const size_t stride = (static_cast<size_t>(k) + 7) / 8;
  w.mask.resize(static_cast<size_t>(n) * stride);
  const std::vector<uint8_t> keep = kept(n, k, mask, random);
  std::normal_distribution<float> normal;
  for (size_t row = 0; row < static_cast<size_t>(n); ++row) {
    for (size_t i = 0; i < static_cast<size_t>(k); ++i) {
      if (keep[row * static_cast<size_t>(k) + i] == 0) continue;
      uint8_t& byte = w.mask[row * stride + i / 8];
      byte = static_cast<uint8_t>(byte | 1u << (i % 8));
      w.columns.push_back(i);
      if (!is_float) w.ints.push_back(static_cast<int8_t>(int8_value(values, i, random)));
      const float value =
          values == Values::extreme ? std::ldexp(normal(random), static_cast<int>(random() % 40) - 20) : normal(random);
      w.floats.push_back(is_float ? (value == 0 ? 1.0f : value) : static_cast<float>(w.ints.back()));
    }
    w.rows.push_back(w.columns.size());
  }
  return w;
}

inline std::vector<uint8_t> packed_of(Format format, const Weight& w, int activation_bits, int threads = 1) {
  const void* values = is_float(format) ? static_cast<const void*>(w.floats.data()) : w.ints.data();
  return pycompress::sparse::pack(format, w.mask.data(), values, w.n, w.k, static_cast<int64_t>(w.nonzeros()),
                                  is_float(format) ? 0 : activation_bits, threads);
}

inline bool runs_here(Format format) {
  using namespace pycompress;
  if (!is_delegated(format)) return true;
  return int8::kernel_for(format == Format::windows ? int8::Layout::windows : int8::Layout::chains) != nullptr;
}

// Numbers that are hard to round or to put through an activation.
inline float hard_value(size_t i, std::mt19937& random) {
  constexpr float kHard[] = {0.0f, -0.0f, INFINITY, -INFINITY, 1e30f, -1e30f, 65519.0f, 65520.0f, 1e-8f, -1e-40f};
  if (i % 23 == 22) return pycompress::to_float(0x7fffffff);  // a NaN that rounding up would turn into a zero
  return i % 3 == 0 ? kHard[i / 3 % 10] : std::normal_distribution<float>(0, 3)(random);
}

// x[m, k] of a type, row stride ldx, NaN between the rows; its elements need no more than their own alignment.
class Input {
 public:
  Input(Type type, int m, int k, int ldx, Edge edge, size_t gap)
      : type_(type), k_(k), ldx_(ldx), bytes_(count(m, k, ldx) * size_of(type), edge, gap * size_of(type)) {
    for (size_t i = 0; i < count(m, k, ldx); ++i) store(i, std::nanf(""));
  }
  void set(int row, int i, float value) { store(static_cast<size_t>(row * ldx_ + i), value); }
  void fill(int m, Values values, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int row = 0; row < m; ++row)
      for (int i = 0; i < k_; ++i) {
        float value = normal(random);
        if (values == Values::uniform && row % 7 == 6) value = 0;  // a row of zeros
        if (values == Values::extreme) value = random() % 2 ? 1.0f : -1.0f;
        if (at_their_largest(values)) value = 1.0f;  // every quantized activation at its largest
        set(row, i, value);
      }
  }
  float at(int row, int i) const { return pycompress::float_at(bytes_.data(), type_, ptrdiff_t{row} * ldx_ + i); }
  const void* data() const { return bytes_.data(); }
  Type type() const { return type_; }
  int ldx() const { return ldx_; }

 private:
  static size_t count(int m, int k, int ldx) { return m == 0 ? 0 : static_cast<size_t>((m - 1) * ldx + k); }
  void store(size_t i, float value) { pycompress::put_float(bytes_.data(), type_, static_cast<ptrdiff_t>(i), value); }

  Type type_;
  int k_, ldx_;
  Guarded<uint8_t> bytes_;
};

// Equal to the bit, but that any NaN equals any other.
inline bool same(const void* a, const void* b, Type type, size_t count) {
  const size_t size = size_of(type);
  if (count == 0 || std::memcmp(a, b, count * size) == 0) return true;
  for (size_t i = 0; i < count; ++i) {
    const auto* at = static_cast<const char*>(a) + i * size;
    if (std::memcmp(at, static_cast<const char*>(b) + i * size, size) == 0) continue;
    if (type == Type::int32) return false;
    const auto index = static_cast<ptrdiff_t>(i);
    if (!std::isnan(pycompress::float_at(a, type, index)) || !std::isnan(pycompress::float_at(b, type, index)))
      return false;
  }
  return true;
}

}  // namespace native
