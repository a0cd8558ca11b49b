// 16-bit floats of a type that the compiler knows, as bits.
#pragma once

#include "../common/types.h"
#include "device.cuh"

namespace pycompress::gpu {
namespace {

template <Type kType>
__device__ inline uint16_t rounded(float v) {
  if constexpr (kType == Type::float16)
    return __half_as_ushort(__float2half_rn(v));
  else
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <Type kType>
__device__ inline float widened(uint16_t bits) {
  if constexpr (kType == Type::float16)
    return __half2float(__ushort_as_half(bits));
  else
    return __bfloat162float(__ushort_as_bfloat16(bits));
}

// Two bfloat16 as two of kType: exact from 2^-17 to 65504.
template <Type kType>
__device__ inline uint32_t converted(uint32_t pair) {
  if constexpr (kType == Type::bfloat16) return pair;
  const __half2 halves = __floats2half2_rn(float_of(pair << 16), float_of(pair & 0xffff0000u));
  return __half_as_ushort(halves.x) | static_cast<uint32_t>(__half_as_ushort(halves.y)) << 16;
}

}  // namespace
}  // namespace pycompress::gpu
