// The GEMM of halves on CUDA: y[m, n] = act(sum_k x[m, k] w[n, k] + bias[n]), x, w and y of one 16-bit type.
//
// Sums are float32, in steps of 16 products whose order the tensor cores choose, the same at every call. With
// v(c) = 2^-23 (17 (c + 1) + 9) for c = k / 16 steps (csrc/weight_only/cuda.h), u = 2^-8 for bfloat16, 2^-11 for
// float16,
//     |y - y64| <= v(k / 16) sum_k |x w| + u (|y64| + |bias|)   before the activation
// Any m, n and k run. x is read up to its k-th column and w up to its n-th row; behind k, w has zeros.
//
// The floor of the op: 2mnk operations at the tensor cores' 16-bit peak, or the bytes of x, w and y at the memory's
// bandwidth.
//
// No CUDA header is needed here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/types.h"

struct CUstream_st;

namespace pycompress::halves {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int kPadK = 64;  // w's rows are whole lines of 128 bytes

struct Problem {
  const void* x;  // [m, k], aligned to 16 bytes
  Type type;      // float16 or bfloat16
  int64_t m, n, k;
  int64_t ldx;        // elements, a multiple of 8
  const uint16_t* w;  // [n][k_pad], aligned to 16 bytes
  int64_t k_pad;      // a multiple of kPadK
  const float* bias;  // [n] or null
  Activation activation;
  void* y;      // [m, n]
  int64_t ldy;  // elements
  Stream stream;
};

// Tiles bm x bn of y, bk bytes of k a stage. arch, cluster: as in csrc/int8/cuda.h.
struct Kernel {
  const char* name;
  Type type;
  int arch, bm, bn, bk, stages;
  void (*run)(const Problem& problem);
  int cluster = 1;
};
const Kernel* kernels(int* count);             // all, best first where the tiles are alike
const Kernel& kernel_named(const char* name);  // throws where there is none
const Kernel& chosen_kernel(Type type, int64_t m, int64_t n, int64_t k, int arch, int multiprocessors);

void multiply(const Problem& problem, const Kernel* forced = nullptr);

}  // namespace pycompress::halves
