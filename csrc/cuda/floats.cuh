// Four values of y that one thread finishes at once: the vector type of the activations, and how they are stored.
#pragma once

#include <cstring>

#include "../common/activation.h"
#include "device.cuh"

namespace pycompress::gpu {
namespace {

constexpr int kLanes = 4;  // channels that one thread finishes at once

struct Floats {
  float at[kLanes];
  __device__ static Floats of(float v) { return {{v, v, v, v}}; }
};
template <class F>
__device__ inline Floats each(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
__device__ inline Floats operator+(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] + b.at[i]; });
}
__device__ inline Floats operator-(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] - b.at[i]; });
}
__device__ inline Floats operator*(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] * b.at[i]; });
}
__device__ inline Floats operator/(Floats a, Floats b) {
  return each([&](int i) { return a.at[i] / b.at[i]; });
}
__device__ inline Floats where_less(Floats a, Floats b, Floats yes, Floats no) {
  return each([&](int i) { return a.at[i] < b.at[i] ? yes.at[i] : no.at[i]; });
}
__device__ inline Floats power_of_two(Floats n) {
  return each([&](int i) { return float_of(static_cast<uint32_t>(static_cast<int>(n.at[i]) + 127) << 23); });
}

__device__ inline uint32_t bits_of_half(float value, Type type) {
  return type == Type::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                : __half_as_ushort(__float2half_rn(value));
}

template <class T>
__device__ inline void store_each(T* y, const T (&values)[kLanes], int count) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i)
    if (i < count) y[i] = values[i];
}

// Values [at, at + kLanes) of y, of which `count` are there; vectors: all, aligned. __stcg: the compiler would break a
// plain store of four into those that the other branch has.
__device__ inline void store_values(void* to, Type type, bool vectors, int64_t at, const Floats& v, int count) {
  if (type == Type::float32) {
    auto* y = static_cast<float*>(to) + at;
    if (vectors)
      __stcg(reinterpret_cast<float4*>(y), make_float4(v.at[0], v.at[1], v.at[2], v.at[3]));
    else
      store_each(y, v.at, count);
    return;
  }
  auto* y = static_cast<uint16_t*>(to) + at;
  uint16_t halves[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>(bits_of_half(v.at[i], type));
  if (vectors)
    __stcg(reinterpret_cast<uint2*>(y), make_uint2(halves[0] | static_cast<uint32_t>(halves[1]) << 16,
                                                   halves[2] | static_cast<uint32_t>(halves[3]) << 16));
  else
    store_each(y, halves, count);
}

// The same where all are there and aligned, of a type known to the compiler: what large layers need, as short as it
// can be.
template <Type kType>
__device__ inline void store_plain_values(void* to, int64_t at, const Floats& v) {
  if constexpr (kType == Type::float32) {
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
    return;
  }
  uint2 four;
  if constexpr (kType == Type::bfloat16) {
    const __nv_bfloat162 pairs[] = {__floats2bfloat162_rn(v.at[0], v.at[1]), __floats2bfloat162_rn(v.at[2], v.at[3])};
    std::memcpy(&four, pairs, sizeof(four));
  } else {
    const __half2 pairs[] = {__floats2half2_rn(v.at[0], v.at[1]), __floats2half2_rn(v.at[2], v.at[3])};
    std::memcpy(&four, pairs, sizeof(four));
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + at) = four;
}

}  // namespace
}  // namespace pycompress::gpu
