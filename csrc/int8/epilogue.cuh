// The epilogue of all CUDA kernels: four sums of one row become four values of y. The same float steps as scalar.cpp.
#pragma once

#include <cstring>

#include "../common/activation.h"
#include "../cuda/device.cuh"
#include "cuda.h"

namespace pycompress::int8::cuda {
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
  return each([&](int i) { return gpu::float_of(static_cast<uint32_t>(static_cast<int>(n.at[i]) + 127) << 23); });
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

struct Columns;
struct Row;

// What the epilogue needs besides the sums; a kernel's argument.
struct Output {
  using Sum = int32_t;
  using Columns = cuda::Columns;
  using Row = cuda::Row;

  const int32_t* column_sum;  // [n_pad]
  const float* weight_scale;  // [n], or null: y is the sums
  const float* bias;          // [n] or null
  const float* row_scale;     // [m]
  const int32_t* zero_point;  // [m]
  void* y;                    // [m, n]
  int64_t m, n;
  Activation activation;
  Type type;
  bool vectors;  // n is a multiple of four, and all but the rows' pointers are aligned to four values
};

inline Output output_of(const Problem& p) {
  const auto misaligned = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes != 0;
  };
  const bool vectors = p.n % kLanes == 0 && !misaligned(p.y, kLanes * size_of(p.y_type)) && !misaligned(p.packed, 16) &&
                       !misaligned(p.weight_scale, 16) && !misaligned(p.bias, 16);
  return {reinterpret_cast<const int32_t*>(p.packed + PackedShape{p.n, p.k}.column_sum()),
          p.weight_scale,
          p.bias,
          p.rows.scale,
          p.rows.zero_point,
          p.y,
          p.m,
          p.n,
          p.activation,
          p.y_type,
          vectors};
}

// Channels [n, n + kLanes), of which those that are there count.
struct Columns {
  int32_t sum[kLanes] = {};
  Floats scale = {}, bias = {};

  __device__ Columns(const Output& out, int64_t n) {
    if (out.vectors) {
      if (n >= out.n) return;
      load(sum, out.column_sum + n);
      if (out.weight_scale != nullptr) load(scale.at, out.weight_scale + n);
      if (out.bias != nullptr) load(bias.at, out.bias + n);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (n + i >= out.n) continue;
      sum[i] = out.column_sum[n + i];
      if (out.weight_scale != nullptr) scale.at[i] = out.weight_scale[n + i];
      if (out.bias != nullptr) bias.at[i] = out.bias[n + i];
    }
  }

 private:
  template <class T>
  __device__ static void load(T (&to)[kLanes], const T* from) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    const uint32_t bits[] = {four.x, four.y, four.z, four.w};
    std::memcpy(to, bits, sizeof(bits));
  }
};

struct Row {
  float scale;
  int32_t zero_point;
};
__device__ inline Row row_at(const Output& out, int64_t m) { return {out.row_scale[m], out.zero_point[m]}; }

// The sums with the zero point in them. Unsigned: the correction may wrap on the way to a sum that fits.
struct Corrected {
  uint32_t at[kLanes];

  __device__ Corrected(const int32_t (&products)[kLanes], const Columns& columns, const Row& row) {
    const auto zero = static_cast<uint32_t>(128 - row.zero_point);
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      at[i] = static_cast<uint32_t>(products[i]) + zero * static_cast<uint32_t>(columns.sum[i]);
  }
};

// What the activation is given.
__device__ inline Floats scaled(const Output& out, const Corrected& sums, const Columns& columns, const Row& row) {
  Floats v = each([&](int i) { return static_cast<float>(static_cast<int32_t>(sums.at[i])); });
  v = (v * Floats::of(row.scale)) * columns.scale;
  return out.bias != nullptr ? v + columns.bias : v;
}

// --- sums that a branch is added to
// -------------------------------------------------------------------------------------

// Channels n and n + 1, as a thread has them in the tensor cores' layout of sums; n is even.
struct ColumnPair {
  int32_t sum[2] = {};
  float scale[2] = {};

  __device__ ColumnPair(const Output& out, int64_t n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n + i >= out.n) continue;
      sum[i] = out.column_sum[n + i];
      scale[i] = out.weight_scale[n + i];
    }
  }
  __device__ ColumnPair(const int32_t* sums, const float* scales) {
    const int2 s = *reinterpret_cast<const int2*>(sums);
    const float2 f = *reinterpret_cast<const float2*>(scales);
    sum[0] = s.x, sum[1] = s.y, scale[0] = f.x, scale[1] = f.y;
  }
};

// As scaled(), of one sum.
__device__ inline float scaled_sum(int32_t product, const ColumnPair& columns, int i, const Row& row) {
  const auto zero = static_cast<uint32_t>(128 - row.zero_point);
  const uint32_t sum = static_cast<uint32_t>(product) + zero * static_cast<uint32_t>(columns.sum[i]);
  return (static_cast<float>(static_cast<int32_t>(sum)) * row.scale) * columns.scale[i];
}
__device__ inline Row row_or_none(const Output& out, int64_t m) { return m < out.m ? row_at(out, m) : Row{0, 0}; }

// --- from sums to y
// -----------------------------------------------------------------------------------------------------

// y[m, n...] of the products' sums; m < out.m and n < out.n.
__device__ inline void finish(const Output& out, const int32_t (&products)[kLanes], const Columns& columns,
                              const Row& row, int64_t m, int64_t n) {
  const Corrected sums(products, columns, row);
  const int count = out.n - n < kLanes ? static_cast<int>(out.n - n) : kLanes;
  const int64_t at = m * out.n + n;
  if (out.type == Type::int32) {
    auto* y = static_cast<uint32_t*>(out.y) + at;
    if (out.vectors)
      __stcg(reinterpret_cast<uint4*>(y), make_uint4(sums.at[0], sums.at[1], sums.at[2], sums.at[3]));
    else
      store_each(y, sums.at, count);
    return;
  }
  const Floats v = activate(out.activation, scaled(out, sums, columns, row));
  store_values(out.y, out.type, out.vectors, at, v, count);
}

// The same of four values that are all there, without an activation.
template <Type kType>
__device__ inline void finish_plain(const Output& out, const int32_t (&products)[kLanes], const Columns& columns,
                                    const Row& row, int64_t m, int64_t n) {
  store_plain_values<kType>(out.y, m * out.n + n, scaled(out, Corrected(products, columns, row), columns, row));
}

}  // namespace
}  // namespace pycompress::int8::cuda
