// A matrix to be added by an epilogue (int8::Addend): it gives the tiles that are asked for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "guarded.h"
#include "int8/gemm.h"

namespace native {

class Summand {
 public:
  // [m, n], asked for by panels of so many channels. Its tiles are copied into the caller's room, all of which is
  // overwritten; or they lie between guard pages, as tight as the contract allows.
  Summand(int m, int n, int panel, bool in_room, std::mt19937& random)
      : m_(m), n_(n), panel_(panel), in_room_(in_room), tiles_(in_room ? 0 : floats_of(m, n, panel)) {
    for (int i = 0; i < m * n; ++i) values_.push_back(std::normal_distribution<float>()(random));
    std::fill_n(tiles_.data(), tiles_.size(), std::nanf(""));
    for (int first = 0; first < n && !in_room; first += panel)
      for (int row = 0; row < m; ++row)
        copy(row, first, std::min(panel, n - first), tiles_.data() + offset(row, first));
  }
  pycompress::int8::Addend addend() const { return {this, tile}; }
  const float* data() const { return values_.data(); }  // row stride n

 private:
  static constexpr int kStride = pycompress::int8::kAddendStride, kReadable = 16;

  // The last row ends with the 16 floats that may be read, or with its columns where there are more.
  static size_t floats_of(int m, int n, int panel) {
    const int panels = (n + panel - 1) / panel;
    return static_cast<size_t>((panels * m - 1) * kStride + std::max(kReadable, panel));
  }
  ptrdiff_t offset(int64_t row, int64_t first) const { return (first / panel_ * m_ + row) * kStride; }

  void copy(int64_t row, int64_t first, int columns, float* out) const {
    std::copy_n(values_.data() + row * n_ + first, columns, out);
  }

  static const float* tile(const void* context, int64_t row, int rows, int64_t n, int columns, float* room) {
    const auto& self = *static_cast<const Summand*>(context);
    const bool right = row >= 0 && rows >= 1 && row + rows <= self.m_ && n >= 0 && n % self.panel_ == 0 &&
                       columns == std::min<int64_t>(self.panel_, self.n_ - n);
    if (!right) {
      std::printf("FAILED: rows %d to %d, channels %d to %d were asked for, of [%d, %d]\n", static_cast<int>(row),
                  static_cast<int>(row) + rows, static_cast<int>(n), static_cast<int>(n) + columns, self.m_, self.n_);
      std::abort();
    }
    if (!self.in_room_) return self.tiles_.data() + self.offset(row, n);
    std::fill_n(room, rows * kStride, std::nanf(""));
    for (int i = 0; i < rows; ++i) self.copy(row + i, n, columns, room + i * kStride);
    return room;
  }

  int m_, n_, panel_;
  bool in_room_;
  std::vector<float> values_;
  Guarded<float> tiles_;
};

}  // namespace native
