// float32 from and to the 16-bit types, in plain integer code: what the scalar kernels load and store.
#pragma once

#include <cstring>

#include "types.h"

namespace pycompress {
namespace {

inline float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 31) return to_float(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) return to_float(sign | to_bits(static_cast<float>(fraction) * 0x1p-24f));
  return to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000)  // subnormal: the float adder rounds to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (to_bits(to_float(magnitude) + 0.5f) - to_bits(0.5f)));
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float_at(const void* x, Type type, ptrdiff_t i) {
  if (type == Type::bfloat16) return to_float(static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16);
  if (type == Type::float16) return from_float16(static_cast<const uint16_t*>(x)[i]);
  return static_cast<const float*>(x)[i];
}

inline void put_float(void* y, Type type, ptrdiff_t i, float value) {
  if (type == Type::float32) static_cast<float*>(y)[i] = value;
  if (type == Type::bfloat16) static_cast<uint16_t*>(y)[i] = to_bfloat16(value);
  if (type == Type::float16) static_cast<uint16_t*>(y)[i] = to_float16(value);
}

}  // namespace
}  // namespace pycompress
