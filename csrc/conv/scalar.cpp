// The specification: plain loops, one statement per line of the formula in conv.h.
#include <cmath>
#include <cstring>

#include "../common/activation.h"
#include "../common/float16.h"
#include "conv.h"
#include "kernel_list.h"

namespace pycompress::conv {
namespace {

inline Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.value * b.value + c.value}; }  // of whole numbers: exact
inline Scalar larger(Scalar a, Scalar b) { return {a.value > b.value ? a.value : b.value}; }
inline Scalar smaller(Scalar a, Scalar b) { return {a.value < b.value ? a.value : b.value}; }
inline Scalar rounded(Scalar a) { return {std::nearbyint(a.value)}; }
template <class V, Type kType>
V load_as(const void* x, int64_t i, int64_t) {
  if (kType == Type::uint8) return {static_cast<float>(static_cast<const uint8_t*>(x)[i])};
  return {float_at(x, kType, i)};
}
template <Type kType>
void store_as(void* y, int64_t i, Scalar v, int64_t) {
  if (kType == Type::int32)
    static_cast<int32_t*>(y)[i] = static_cast<int32_t>(v.value);
  else
    put_float(y, kType, i, v.value);
}
inline void store_bytes(uint8_t* y, Scalar v, const int8::Requantize& to, int64_t) {
  const float steps = v.value * to.inverse;
  const float inside = steps > to.high ? to.high : steps > to.low ? steps : to.low;
  *y = static_cast<uint8_t>(static_cast<int>(std::nearbyint(inside)) + to.zero_point);
}

}  // namespace
}  // namespace pycompress::conv

#include "depthwise.h"

namespace pycompress::conv {
namespace {

Extremes extremes(const void* x, Type type, int64_t count) {
  Extremes found{0, 0, true};
  for (int64_t i = 0; i < count; ++i) {
    const float value = float_at(x, type, i);
    found.finite = found.finite && std::isfinite(value);
    found.low = value < found.low ? value : found.low;
    found.high = value > found.high ? value : found.high;
  }
  return found;
}

bool quantize(const void* x, Type type, int64_t channels, int64_t positions, int64_t channel_stride,
              int64_t position_stride, const Range& range, int amax, uint8_t* q, int64_t ldq) {
  bool finite = true;
  for (int64_t i = 0; i < positions; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const Scalar value{float_at(x, type, c * channel_stride + i * position_stride)};
      finite = finite && std::isfinite(value.value);
      q[i * ldq + c] =
          static_cast<uint8_t>(static_cast<int>(Quantizer<Scalar>(range, amax)(value).value) + range.zero_point);
    }
  return finite;
}

void reorder(const uint8_t* row, int8::ActivationShape shape, uint8_t* data) {
  for (int block = 0; block < shape.blocks(); ++block) {
    const int length = shape.length(block);
    uint8_t* out = data + shape.offset(block);
    for (int v = 0; v < shape.versions; ++v)
      for (int i = 0; i < length; ++i) *out++ = row[block * int8::kBlockK + i / 4 * 4 + int8::kOrder[v][i % 4]];
  }
}

void transpose(const void* from, int64_t ld, int rows, int columns, size_t size, void* to, int64_t stride) {
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < rows; ++r)
      std::memcpy(target + static_cast<size_t>(c * stride + r) * size, source + static_cast<size_t>(r * ld + c) * size,
                  size);
}

}  // namespace

const Kernel kScalar{"scalar", Isa::scalar, kPixels, 1, 1, extremes, quantize, reorder, transpose, depthwise<Scalar>};

}  // namespace pycompress::conv
