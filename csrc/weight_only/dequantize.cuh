// Packed integers to pairs of 16-bit floats in registers, exactly: an integer is or-ed into the mantissa of a power of
// two and the power is taken away again (Kim et al. 2022, arXiv:2211.10017, page 4). The low half of a register is the
// first position. Which bits belong together: shuffle.h.
#pragma once

#include "../common/types.h"
#include "../cuda/device.cuh"

namespace pycompress::weight_only::cuda {
namespace {

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// a - b and a * b + c of two halves at once.
template <Type kType>
__device__ inline uint32_t subtract(uint32_t a, uint32_t b) {
  if constexpr (kType == Type::float16)
    return bits_as<uint32_t>(__hsub2(bits_as<__half2>(a), bits_as<__half2>(b)));
  else
    return bits_as<uint32_t>(__hsub2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
}
__device__ inline uint32_t fma_f16(uint32_t a, uint32_t b, uint32_t c) {
  return bits_as<uint32_t>(__hfma2(bits_as<__half2>(a), bits_as<__half2>(b), bits_as<__half2>(c)));
}

// Bytes 0 and 2, and 1 and 3, of a word of int8 weights, of which each is the value + 128.
template <Type kType>
__device__ inline void expand_bytes(uint32_t word, uint32_t& even, uint32_t& odd) {
  if constexpr (kType == Type::float16) {  // 0x6400 | b = 1024 + b
    even = subtract<kType>(__byte_perm(word, 0x64646464, 0x4240), 0x64806480);
    odd = subtract<kType>(__byte_perm(word, 0x64646464, 0x4341), 0x64806480);
  } else {  // the mantissa has 7 bits: 0x4300 | b % 128 = 128 + b % 128, less 128 where bit 7 is set and 256 where not
    const uint32_t high = word >> 8;
    even = subtract<kType>((word & 0x007f007f) | 0x43004300, (word & 0x00800080) ^ 0x43804380);
    odd = subtract<kType>((high & 0x007f007f) | 0x43004300, (high & 0x00800080) ^ 0x43804380);
  }
}

// What takes the zero points of channels g (the low nibble of `zero`) and g + 8 (the high one) away.
struct ZeroPoints {
  uint32_t low, high;
};
template <Type kType>
__device__ inline ZeroPoints zero_points(uint32_t zero) {
  const uint32_t low = (zero & 15) * 0x10001, high = (zero & 0xf0) * 0x10001;
  if constexpr (kType == Type::float16) return {0x64006400 | low, 0xd400d400 | high};  // 1024 + z; -(64 + z)
  return {0x43004300 | low, 0x43004300 | high >> 4};                                   // 128 + z
}

// A word of int4 weights as the four registers of a fragment, less their zero points.
template <Type kType>
__device__ inline void expand_nibbles(uint32_t word, ZeroPoints zero, uint32_t (&a)[4]) {
  if constexpr (kType == Type::float16) {
    constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0, kBase = 0x64006400, kSixteenth = 0x2c002c00;
    const uint32_t rest = word >> 8;
    a[0] = subtract<kType>((word & kLow) | kBase, zero.low);
    a[1] = fma_f16((word & kHigh) | kBase, kSixteenth, zero.high);  // (1024 + 16 v) / 16 - (64 + z)
    a[2] = subtract<kType>((rest & kLow) | kBase, zero.low);
    a[3] = fma_f16((rest & kHigh) | kBase, kSixteenth, zero.high);
  } else {
    for (int i = 0; i < 4; ++i)
      a[i] = subtract<kType>((word >> 4 * i & 0x000f000f) | 0x43004300, i % 2 == 0 ? zero.low : zero.high);
  }
}

}  // namespace
}  // namespace pycompress::weight_only::cuda
