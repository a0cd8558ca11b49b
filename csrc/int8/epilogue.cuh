// The epilogue of integer sums: four of one row become four values of y. The same float steps as scalar.cpp.
#pragma once

#include <cstring>

#include "../cuda/floats.cuh"
#include "cuda.h"

namespace pycompress::int8::cuda {
namespace {

using gpu::each;
using gpu::Floats;
using gpu::kLanes;
using gpu::store_each;
using gpu::store_plain_values;

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
