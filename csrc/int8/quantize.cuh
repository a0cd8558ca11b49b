// The arithmetic of the quantizer, for the kernels that quantize rows of x: 16 bytes of a row, a row's range, how it is
// rounded. The formula is that of gemm.h, bit-equal to scalar.cpp.
#pragma once

#include "../cuda/device.cuh"
#include "cuda.h"

namespace pycompress::int8::cuda {
namespace {

constexpr float kMagic23 = 0x1.8p23f;  // float(n) + kMagic23 has n in its low bits, for |n| < 2^22

template <Type kType>
__device__ inline float from_bits(uint32_t bits) {
  if (kType == Type::float32) return gpu::float_of(bits);
  if (kType == Type::bfloat16) return gpu::float_of(bits << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

template <Type kType>
__device__ inline uint32_t to_bits(float value) {
  if (kType == Type::float32) return gpu::bits_of(value);
  if (kType == Type::bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

template <Type kType>
__device__ inline float rounded(float value) {
  return from_bits<kType>(to_bits<kType>(value));
}

template <Type kType>
__device__ inline float load_one(const void* x, int64_t i) {
  if (kType == Type::float32) return static_cast<const float*>(x)[i];
  return from_bits<kType>(static_cast<const uint16_t*>(x)[i]);
}

// 16 bytes of a row, as they are in memory.
template <Type kType>
struct Vector {
  static constexpr int kElements = kType == Type::float32 ? 4 : 8;
  uint32_t words[4];

  __device__ float get(int i) const {
    if (kType == Type::float32) return from_bits<kType>(words[i]);
    return from_bits<kType>(words[i / 2] >> i % 2 * 16 & 0xffff);
  }
  __device__ void set(int i, float value) {
    if (kType == Type::float32) {
      words[i] = to_bits<kType>(value);
    } else {
      const int shift = i % 2 * 16;
      words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | to_bits<kType>(value) << shift;
    }
  }
  // Elements [first, first + kElements) of a row of k; 0 behind its end.
  __device__ static Vector load(const void* row, int first, int k, bool aligned) {
    if (aligned && first + kElements <= k) {
      constexpr int kBytes = 16 / kElements;
      const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(row) + first * kBytes);
      return {{v.x, v.y, v.z, v.w}};
    }
    Vector v{};
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (first + i < k) v.set(i, load_one<kType>(row, first + i));
    return v;
  }
};

struct Range {
  float values[3] = {0, 0, 0};  // -min(0, x), max(0, x), and 1 where x is not finite

  __device__ void add(float x) {
    values[0] = fmaxf(values[0], -x);
    values[1] = fmaxf(values[1], x);
    if ((gpu::bits_of(x) & 0x7f800000) == 0x7f800000) values[2] = 1;
  }
};

// How a row is rounded: the formula of gemm.h.
struct Rounding {
  float scale, inverse;
  int zero_point, high;

  __device__ Rounding(const Range& range, int bits) : scale(0), inverse(0), zero_point(0), high(0) {
    const float half = 0.5f * range.values[1] - 0.5f * -range.values[0];
    if (range.values[2] != 0) {
      scale = gpu::float_of(0x7fc00000);
    } else if (half >= 0x1p-100f) {
      high = (1 << bits) - 1;
      const float half_max = 0.5f * static_cast<float>(high);
      inverse = half_max / half;
      scale = half / half_max;
      zero_point = clamped(nearest(range.values[0] * inverse));
    }
  }
  // s = q - 128 in the low byte; q is 0 in a row that is not finite or all zeros, where `high` is 0
  __device__ uint32_t byte(float x) const {
    return static_cast<uint32_t>(clamped(nearest(x * inverse) + zero_point)) ^ 0x80;
  }

 private:
  __device__ static int nearest(float value) {
    return static_cast<int>(gpu::bits_of(value + kMagic23) - gpu::bits_of(kMagic23));
  }
  __device__ int clamped(int value) const { return min(max(value, 0), high); }
};

// s of the elements [first, first + kElements) of a row of k; 0 behind its end.
template <Type kType>
__device__ inline void store_rounded(int8_t* s, const Vector<kType>& v, const Rounding& rounding, int first, int k) {
  constexpr int kElements = Vector<kType>::kElements;
  uint32_t words[kElements / 4] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) words[i / 4] |= rounding.byte(v.get(i)) << i % 4 * 8;
  if (first + kElements > k) {
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (first + i >= k) words[i / 4] &= ~(0xffu << i % 4 * 8);
  }
  if (kType == Type::float32)
    *reinterpret_cast<uint32_t*>(s + first) = words[0];
  else
    *reinterpret_cast<uint2*>(s + first) = make_uint2(words[0], words[kElements / 4 - 1]);
}

}  // namespace
}  // namespace pycompress::int8::cuda
