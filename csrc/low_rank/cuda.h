// Low-rank linear on CUDA, for few rows: the contract of the op there.
//
//   t[m, r] = sum_k x[m, k] down[r, k], rounded to the type of x and y, float16 or bfloat16
//   y[m, n] = act(sum_r t[m, r] up[n, r] + bias[n])
//
// The factors are the canonical float32 ones rounded to bfloat16, ties away from zero, whatever the type of x is (to
// float16 x they are converted, exactly from 2^-17 to 65504). With v(c, s) = 2^-23 (17 (c + 1) + s + 8) for a sum of c
// steps of 16 products in s parts (csrc/weight_only/cuda.h), u = 2^-8 for bfloat16, 2^-11 for float16,
//     d_r = v(k / 16, s) sum_k |x down_r| + u |t_r|
//     |y - y64| <= sum_r d_r |up_r| + v(rank / 16, s) sum_r (|t_r| + d_r) |up_r| + u (|y| + |bias|)  before the
//     activation
// of the result for the rounded factors, in a fixed order: the same bits at every call on one kind of device. float16:
// a t beyond 65504 is Inf.
//
// Any m runs: rows beyond kMaxRows come in slabs that read the factors again.
//
// The floor of the op: 16 bits a value of the factors at the memory's bandwidth, and two launches.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/round.h"
#include "../int8/gemm.h"

struct CUstream_st;

namespace pycompress::low_rank::cuda {

using Stream = CUstream_st*;  // cudaStream_t
using int8::Activation;
using int8::Type;

constexpr int64_t kMaxK = int8::kMaxK;
constexpr int kMaxRows = 32;  // in one pass over the factors
constexpr int kMaxSplits = 16;
constexpr int kTile = 16, kStep = 64;

// A matrix [n, k], n up to a multiple of kTile, k up to one of kStep, zero filled: tiles of 16 x 16, those of the same
// channels one after the other. In a tile each lane of a warp has the 8 values of its A fragment of mma.m16n8k16: with
// channel = 8 i + g and position = 8 j + 2 t + e, value [g][t][j][i][e] (pycompress/ops/cuda_low_rank.py makes it).
struct Matrix {
  int64_t n, k;
  int64_t size() const { return round_up<int64_t>(n, kTile) * round_up<int64_t>(k, kStep); }
};

// The packed weight: down, then up; the rank is a multiple of kTile, zeros behind what it was.
struct Factors {
  int64_t n, k, rank;
  Matrix down() const { return {rank, k}; }
  Matrix up() const { return {n, rank}; }
};

struct Problem {
  const void* x;
  Type type;       // of x and y: float16 or bfloat16
  int64_t m, ldx;  // ldx: the row stride, elements
  const uint16_t* packed;
  Factors shape;
  const float* bias;  // [n] or null
  Activation activation;
  void* y;          // [m, n], dense
  void* workspace;  // as many bytes as the plan says, aligned to 16
  Stream stream;
};

// `tiles` x 16 channels and `columns` x 8 rows of x a block, whose `warps` share its part of k.
struct Product;
struct Kernel {
  const char* name;
  Type type;
  int tiles, columns, warps, stages;
  void (*run)(const Product& product, int splits);
};
const Kernel* cuda_kernels(int* count);

// How one of the two products runs.
struct Plan {
  const Kernel* kernel;
  int splits;
  int64_t blocks;     // of one part of k
  int64_t workspace;  // bytes
};
Plan plan(const Matrix& matrix, Type type, int64_t m, int multiprocessors);
Plan plan(const Kernel& kernel, const Matrix& matrix, int64_t m, int splits);

struct Plans {
  Plan down, up;
  int64_t workspace;  // bytes
};
Plans plans(const Factors& shape, Type type, int64_t m, int multiprocessors);
Plans plans(const Kernel& kernel, const Factors& shape, int64_t m, int splits);

void linear(const Problem& problem, const Plans& plans);

}  // namespace pycompress::low_rank::cuda
