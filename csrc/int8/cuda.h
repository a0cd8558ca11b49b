// int8 linear on CUDA: the contract of the op there. The formula is that of gemm.h, the integers are the same.
//
//   y[m, n]   = act((float(acc[m, n]) * sx[m]) * sw[n] + bias[n])      each step rounded to float32, no fma
//   acc[m, n] = sum_k s[m, k] w[n, k] + (128 - zp[m]) * column_sum[n]  with s = q - 128, which is int8 as the tensor
//                                                                      cores want it; every sum fits int32 (kMaxK)
//
// With a branch (struct Branch) of rank r,
//   y[m, n] = act(b[m, n] + bias[n]),   b[m, n] = (float(acc[m, n]) * sx[m]) * sw[n] + sum_r t[m, r] up[n, r]
// where up is bfloat16, converted where t is float16, and the tensor cores add steps of 16 products to the scaled
// integers in float32. With v = 2^-23 * 17 (r / 16 + 1), after csrc/weight_only/cuda.h, and s the first term of b,
//     |b - b64| <= v (|s| + sum_r |t up|)
// Where t is zero b is s, so y has the bits that it has without a branch.
//
// Two launches on the caller's stream, nothing waits: quantize() writes s, sx and zp into a workspace, linear() reads
// them. The packed weight is one byte vector, the same for all kernels:
//   int32 column_sum[n_pad]; int8 weights[n_pad][k_pad], zeros behind n and k
// Both operands are row-major along k (as mma and wgmma read them).
//
// The floor of the op: 2mnk operations at the tensor cores' int8 peak, or the bytes of x, s, weights and y at the
// memory's bandwidth.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/host_device.h"
#include "gemm.h"

struct CUstream_st;

namespace pycompress::int8::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int kPadN = 128, kPadK = 64;  // bytes; the row stride of both operands is a multiple of kPadK

struct PackedShape {
  int64_t n, k;
  PYCOMPRESS_HOST_DEVICE int64_t n_pad() const { return (n + kPadN - 1) / kPadN * kPadN; }
  PYCOMPRESS_HOST_DEVICE int64_t k_pad() const { return (k + kPadK - 1) / kPadK * kPadK; }
  // Byte offsets.
  PYCOMPRESS_HOST_DEVICE int64_t column_sum() const { return 0; }
  PYCOMPRESS_HOST_DEVICE int64_t weights() const { return column_sum() + n_pad() * 4; }
  PYCOMPRESS_HOST_DEVICE int64_t bytes() const { return weights() + n_pad() * k_pad(); }
};

// What quantize() made of the rows of x.
struct Rows {
  int8_t* s;  // [m][k_pad]; what stands behind k is 0
  float* scale;
  int32_t* zero_point;
};

// What stands in front of the layer and is computed on the way into the quantizer, in float32, then rounded to x's
// type: what the layers one by one hand over.
enum class Before : int {
  none = 0,
  rms_norm = 1,    // x / sqrt(mean(x^2) + eps) * weight
  layer_norm = 2,  // (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
  silu_gate = 3,   // silu(gate) * x, the activation rounded to x's type first
  gelu_gate = 4,
  gelu_tanh_gate = 5,
};

struct Input {
  const void* x;  // [m, k], row stride ldx (elements)
  Type type;
  int64_t m, k, ldx;
  int activation_bits;  // 7 or 8
  Before before = Before::none;
  const void* weight = nullptr;  // of the norm, [k] of x's type, or null: ones
  const void* bias = nullptr;    // of the layer norm, [k] of x's type, or null: zeros
  float eps = 0;
  const void* gate = nullptr;  // [m, k] of x's type, row stride ldg
  int64_t ldg = 0;
};
void quantize(const Input& input, const Rows& rows, Stream stream);

// A product of halves that is added before the bias and the activation: the up-projection of a branch of low rank
// beside the integers (SVDQuant, Li et al. 2024), whose t = x down^T comes with the quantized rows
// (csrc/low_rank/branch.h).
struct Branch {
  const void* t = nullptr;     // [m][rank_pad], aligned to 16 bytes; null: no branch
  const void* up = nullptr;    // bfloat16 [n][rank_pad], aligned to 16 bytes
  int64_t rank_pad = 0;        // a multiple of kPadRank
  int64_t rank = 0;            // of both; behind it they are zeros, of which most are left out
  Type type = Type::bfloat16;  // of t, bfloat16 or float16
};
constexpr int kPadRank = 64;

struct Problem {
  Rows rows;
  int64_t m, n, k;
  const uint8_t* packed;
  const float* weight_scale;  // [n]; null for Type::int32
  const float* bias;          // [n] or null
  Activation activation;
  void* y;  // [m, n], dense
  Type y_type;
  Stream stream;
  Branch branch = {};
};

// Tiles bm x bn of y, bk bytes of k a stage. `arch` is the compute capability that the code needs, times ten:
// 80 runs there and on all later ones, 90 on 9.0 alone (wgmma is of no other).
struct Kernel {
  const char* name;
  int arch, bm, bn, bk, stages;
  void (*run)(const Problem& problem);
  int cluster = 1;  // blocks, their tiles above each other, that fetch the channels together
};
const Kernel* kernels(int* count);             // all, best first where the tiles are alike
const Kernel& kernel_named(const char* name);  // throws where there is none
const Kernel& chosen_kernel(int64_t m, int64_t n, int64_t k, int arch, int multiprocessors);

void linear(const Problem& problem, const Kernel* forced = nullptr);

// values int8 [n, k] dense on the device -> packed [PackedShape::bytes], and back. A -128 counts in *refused (int32 on
// the device, which the caller set to 0 and reads).
void pack(const int8_t* values, int64_t n, int64_t k, uint8_t* packed, int32_t* refused, Stream stream);
void unpack(const uint8_t* packed, int64_t n, int64_t k, int8_t* values, Stream stream);

// s back to what the op calls q: uint8 [m, k] dense.
void unsigned_rows(const Rows& rows, int64_t m, int64_t k, uint8_t* q, Stream stream);

}  // namespace pycompress::int8::cuda
