// The specification: plain loops, one statement per line of the formula in gemm.h.
#include <algorithm>
#include <cmath>

#include "../common/activation.h"
#include "../common/float16.h"
#include "kernel_list.h"
#include "pack.h"

namespace pycompress::int4 {
namespace {

constexpr int kMr = 4;

constexpr int byte_of(int i, int n) { return (i / 4 * kPanel + n) * 4 + i % 4; }  // of position i, channel n, expanded

void expand(const Panel& panel, const Expanded& to) {
  for (int i = 0; i < panel.units * kUnit; ++i) {
    const int group = i / kUnit / panel.group_units;
    for (int n = 0; n < kPanel; ++n) {
      const uint8_t byte = panel.nibbles[i / kUnit * kUnitBytes + nibble_byte(i % kUnit, n)];
      to.weights[byte_of(i, n)] = static_cast<int8_t>(nibble(byte, is_high(i)) - zero_of(panel, group, n));
      to.scale[group * kPanel + n] = to_float(static_cast<uint32_t>(panel.scale[group * kPanel + n]) << 16);
    }
  }
}

void tile(const uint8_t* q, ptrdiff_t ldq, int rows, const Panel& panel, const Expanded& from, float* v,
          bool accumulate) {
  const int group_size = panel.group_units * kUnit, k = panel.units * kUnit;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < kPanel; ++n) {
      float sum = accumulate ? v[m * kPanel + n] : 0.0f;
      for (int group = 0; group * group_size < k; ++group) {
        int32_t dot = 0;
        for (int i = group * group_size; i < std::min(k, (group + 1) * group_size); ++i)
          dot += static_cast<int32_t>(q[m * ldq + i]) * from.weights[byte_of(i, n)];
        sum = std::fma(static_cast<float>(dot), from.scale[group * kPanel + n], sum);
      }
      v[m * kPanel + n] = sum;
    }
}

void finish(const float* v, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      const float u = std::fma(-static_cast<float>(e.zero_point[m]), e.offset[n], v[m * kPanel + n]);
      Scalar r{u * e.row_scale[m]};
      if (e.bias != nullptr) r = r + Scalar{e.bias[m * e.bias_stride + n]};
      put_float(y, e.type, m * ldy + n, activate(e.activation, r).value);
    }
}

}  // namespace

const Kernel kScalar{"scalar_4x16", Isa::scalar, kMr, kPanel, 1, expand, tile, nullptr, finish};

}  // namespace pycompress::int4
