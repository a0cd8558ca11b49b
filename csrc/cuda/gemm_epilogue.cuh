// What the engines of gemm_sm80.cuh and gemm_sm90.cuh ask of an output, and the output whose sums are floats.
//
// An output is a kernel's argument with m, n, y, activation, type and vectors, its types Sum, Columns and Row, and
//   Columns(out, n)                            what it needs of channels [n, n + kLanes), those that are there
//   row_at(out, m)                             of a row
//   finish(out, sums, columns, row, m, n)      kLanes sums become y; m < out.m, n < out.n
//   finish_plain<kType>(...)                   the same where out.vectors, out.type == kType and there is no activation
// int8 sums: csrc/int8/epilogue.cuh.
#pragma once

#include "floats.cuh"

namespace pycompress::gpu {
namespace {

struct FloatColumns;
struct FloatRow {};

// y = act(sum + bias)
struct FloatOutput {
  using Sum = float;
  using Columns = FloatColumns;
  using Row = FloatRow;

  const float* bias;  // [n] or null
  void* y;            // [m, n], row stride ldy
  int64_t m, n, ldy;
  Activation activation;
  Type type;
  bool vectors;  // n and ldy are multiples of four, the pointers aligned to four values
};

inline FloatOutput float_output(const float* bias, void* y, int64_t m, int64_t n, int64_t ldy, Activation activation,
                                Type type) {
  const bool vectors = n % kLanes == 0 && ldy % kLanes == 0 &&
                       reinterpret_cast<uintptr_t>(y) % (kLanes * size_of(type)) == 0 &&
                       reinterpret_cast<uintptr_t>(bias) % 16 == 0;
  return {bias, y, m, n, ldy, activation, type, vectors};
}

struct FloatColumns {
  Floats bias = {};

  __device__ FloatColumns(const FloatOutput& out, int64_t n) {
    if (out.bias == nullptr) return;
    if (out.vectors) {
      if (n >= out.n) return;
      const float4 four = *reinterpret_cast<const float4*>(out.bias + n);
      bias = {{four.x, four.y, four.z, four.w}};
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (n + i < out.n) bias.at[i] = out.bias[n + i];
  }
};

__device__ inline FloatRow row_at(const FloatOutput&, int64_t) { return {}; }

__device__ inline Floats biased(const FloatOutput& out, const float (&sums)[kLanes], const FloatColumns& columns) {
  const Floats v = {{sums[0], sums[1], sums[2], sums[3]}};
  return out.bias != nullptr ? v + columns.bias : v;
}

__device__ inline void finish(const FloatOutput& out, const float (&sums)[kLanes], const FloatColumns& columns,
                              const FloatRow&, int64_t m, int64_t n) {
  const int count = out.n - n < kLanes ? static_cast<int>(out.n - n) : kLanes;
  const Floats v = activate(out.activation, biased(out, sums, columns));
  store_values(out.y, out.type, out.vectors, m * out.ldy + n, v, count);
}

template <Type kType>
__device__ inline void finish_plain(const FloatOutput& out, const float (&sums)[kLanes], const FloatColumns& columns,
                                    const FloatRow&, int64_t m, int64_t n) {
  store_plain_values<kType>(out.y, m * out.ldy + n, biased(out, sums, columns));
}

// Sums on their way through shared memory.
__device__ inline void put_pair(int32_t* to, int32_t a, int32_t b) { *reinterpret_cast<int2*>(to) = make_int2(a, b); }
__device__ inline void put_pair(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
__device__ inline void take_four(int32_t (&to)[kLanes], const int32_t* from) {
  const int4 four = *reinterpret_cast<const int4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ inline void take_four(float (&to)[kLanes], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

}  // namespace
}  // namespace pycompress::gpu
