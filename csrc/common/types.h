// The types of what all ops read and write, and the activations of their epilogues.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycompress {

// int32: the accumulators as they are; uint8: numbers that are quantized already.
enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2, int32 = 3, uint8 = 4 };
constexpr size_t size_of(Type type) {
  return type == Type::uint8 ? 1 : type == Type::float32 || type == Type::int32 ? 4 : 2;
}
// Value `i` of a matrix.
inline const uint8_t* value_of(const void* x, Type type, int64_t i) {
  return static_cast<const uint8_t*>(x) + static_cast<size_t>(i) * size_of(type);
}
inline uint8_t* value_of(void* y, Type type, int64_t i) {
  return static_cast<uint8_t*>(y) + static_cast<size_t>(i) * size_of(type);
}

enum class Activation : int {
  none = 0,
  relu = 1,
  gelu = 2,
  gelu_tanh = 3,
  silu = 4,
  quick_gelu = 5,
  relu6 = 6,
  hardswish = 7
};
constexpr int kActivations = 8;

constexpr int64_t kMaxK = 65536;  // 255 * 127 * 65536 < 2^31: sums of int8 products never wrap

}  // namespace pycompress
