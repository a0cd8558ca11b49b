// Sparse linear on CUDA, for few rows: the contract of the op there.
//
//   y[m, n] = act(sum_k x[m, k] w[n, k] + bias[n])
//
// w is the canonical float32 weight, whose values must all be bfloat16 or all be float16 numbers, as those of a model
// in that type are: nothing is rounded. x and y are of the same type. The weight stays compressed in memory (bitmap.h)
// and is expanded in registers, where the tensor cores multiply zeros too: NaN or Inf in x shows in all channels of its
// row, unlike on the CPU. With c = k / 16 steps and s parts of k (csrc/weight_only/cuda.h)
//     |y - y64| <= 2^-23 (17 (c + 1) + s + 8) * sum_k |x w| + eps (|y| + |bias|)    before the activation,
// in a fixed order: the same bits at every call on one kind of device.
//
// Any m runs: rows beyond kMaxRows come in slabs that read the weights again.
//
// The floor of the op: 16 bits a non-zero and 1.3 a weight (1 of the bitmap, 0.3 of what saves counting it) at the
// memory's bandwidth. Expanding takes 12 instructions for two weights of 32 lanes whatever they are: above about 75 %
// zeros it, and not the memory, is the limit.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../common/types.h"
#include "bitmap.h"

struct CUstream_st;

namespace pycompress::sparse::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int kMaxRows = 32;  // in one pass over the weights
constexpr int kMaxSplits = 16;

struct Problem {
  const void* x;
  Type type;  // of x and y: that of the packed values
  int64_t m, ldx;
  const uint8_t* packed;
  Shape shape;
  const float* bias;  // [n] or null
  Activation activation;
  void* y;          // [m, n], dense
  void* workspace;  // as many bytes as the plan says, aligned to 4
  Stream stream;
};

// `tiles` x 16 channels and `columns` x 8 rows of x a block, whose `warps` share its part of k.
struct Kernel {
  const char* name;
  Type type;
  int tiles, columns, warps;
  void (*run)(const Problem& problem, int splits);
};
const Kernel* cuda_kernels(int* count);

struct Plan {
  const Kernel* kernel;
  int splits;
  int64_t blocks;     // of one part of k
  int64_t workspace;  // bytes
};
Plan plan(const Shape& shape, int64_t m, int multiprocessors);
Plan plan(const Kernel& kernel, int64_t n, int64_t m, int splits);
bool fits(const Kernel& kernel, const Shape& shape);  // whether two steps of its warps fit into shared memory

void linear(const Problem& problem, const Plan& plan);

// The weight with its zeros, float32 [n, k].
void dense(const uint8_t* packed, const Shape& shape, float* weight, Stream stream);

}  // namespace pycompress::sparse::cuda
