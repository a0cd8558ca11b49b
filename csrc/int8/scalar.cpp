// The specification: plain loops, one statement per line of the formula in gemm.h.
#include <cmath>
#include <cstring>

#include "../common/activation.h"
#include "../common/float16.h"
#include "kernel_list.h"

namespace pycompress::int8 {
namespace {

float clamp(float value, float bound) { return value < -bound ? -bound : value > bound ? bound : value; }

float rint_even(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }  // |value| < 2^22

int clamp(int value, int high) { return value < 0 ? 0 : value > high ? high : value; }

void quantize(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax, const Range* range,
              uint8_t* data, float* scale, int32_t* zero_point) {
  for (int m = 0; m < rows; ++m, data += shape.stride()) {
    float low = 0, high = 0;
    bool finite = true;
    for (int k = 0; k < shape.k; ++k) {
      const float value = float_at(x, type, m * ldx + k);
      finite = finite && std::isfinite(value);
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    zero_point[m] = range == nullptr ? 0 : range->zero_point;
    std::memset(data, zero_point[m], static_cast<size_t>(shape.stride()));
    scale[m] = finite ? 0.0f : to_float(0x7fc00000);
    const float half = 0.5f * high - 0.5f * low, half_max = 0.5f * static_cast<float>(amax);
    if (!finite || (range == nullptr && half < 0x1p-100f)) continue;
    const float inverse = range == nullptr ? half_max / half : 1.0f / range->scale;
    scale[m] = range == nullptr ? half / half_max : range->scale;
    if (range == nullptr) zero_point[m] = clamp(static_cast<int>(rint_even(-low * inverse)), amax);
    for (int k = 0; k < shape.k; ++k) {
      const float steps = clamp(float_at(x, type, m * ldx + k) * inverse, kBeyond);  // beyond it with a range only
      const int q = clamp(static_cast<int>(rint_even(steps)) + zero_point[m], amax);
      data[k] = static_cast<uint8_t>(q);  // one version only: its blocks lie end to end
    }
  }
}

constexpr int kMr = 4, kNr = 8;

void tile(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c, bool accumulate) {
  const int8_t* w = static_cast<const int8_t*>(panel);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < kNr; ++n) {
      int32_t sum = accumulate ? c[m * kNr + n] : 0;
      for (int k = 0; k < length; ++k) sum += static_cast<int32_t>(a[m * lda + k]) * w[n * length + k];
      c[m * kNr + n] = sum;
    }
}

void finish(const int32_t* c, int nr, int rows, int columns, const Epilogue& e, void* y, ptrdiff_t ldy) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      const int32_t acc = c[m * nr + n] - e.zero_point[m] * e.column_sum[n];
      const ptrdiff_t i = m * ldy + n;
      if (e.type == Type::int32) {
        static_cast<int32_t*>(y)[i] = acc;
        continue;
      }
      Scalar v{(static_cast<float>(acc) * e.row_scale[m]) * e.weight_scale[n]};
      if (e.bias != nullptr) v = v + Scalar{e.bias[m * e.bias_stride + n]};
      if (e.addend != nullptr) v = v + Scalar{e.addend[i]};
      v = activate(e.activation, v);
      uint8_t* bytes = e.type == Type::uint8 ? static_cast<uint8_t*>(y) : e.beside;
      if (bytes != nullptr) {
        const float steps = v.value * e.to.inverse;
        const float inside = steps > e.to.high ? e.to.high : steps > e.to.low ? steps : e.to.low;
        bytes[i] = static_cast<uint8_t>(static_cast<int>(rint_even(inside)) + e.to.zero_point);
        if (e.finite != nullptr && !std::isfinite(v.value)) *e.finite = false;
      }
      if (e.type != Type::uint8) put_float(y, e.type, i, v.value);
    }
}

}  // namespace

const Kernel kScalar{"scalar_4x8", Isa::scalar, kMr, kNr, 1, Layout::rows, quantize, tile, finish};

}  // namespace pycompress::int8
