// Low-rank linear on CUDA: the contract of the op there.
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
// Three ways, of which plan() takes the one that it expects to be the fastest; any m runs on each:
//   few.cu     two thin products, k split among blocks; rows beyond kMaxRows come in slabs that read the factors again
//   fused.cu   one launch for ranks up to kFusedRank: t stays in the shared memory of the block that computed it
//   wide.cu    two products by csrc/cuda/halves.h, t between them in the workspace
// The latter two want x aligned to 16 bytes with rows a multiple of 8 elements apart, and convert the factors for
// float16 by a launch of their own.
//
// The floor of the op: at few rows 16 bits a value of the factors at the memory's bandwidth, and two launches; at many
// 2 m rank (k + n) operations at the tensor cores' peak, or 2 m (k + n) bytes of x and y at the memory's bandwidth,
// which is the greater one up to a rank of about 150 on an A100, 300 on an H100.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../common/round.h"
#include "../common/types.h"

struct CUstream_st;

namespace pycompress::low_rank::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int kMaxRows = 32;     // in one pass of few.cu over the factors
constexpr int kFusedRank = 128;  // the greatest of fused.cu
constexpr int kMaxSplits = 16;
constexpr int kTile = 16, kStep = 64, kPadN = 128;

// Some rows of a factor: [n, k] of which k is a multiple of kTile where it is a rank, zeros up to the row stride.
struct Matrix {
  int64_t n, k, stride;
};

// The packed weight: bfloat16 down [rank_pad][k_pad], then up [n_pad][rank_pad], zero filled; behind them the lower 16
// bits of the same float32 values, which no kernel reads (pycompress/ops/cuda/low_rank.py makes it). The rank is a
// multiple of kTile, with zeros behind what it was.
struct Factors {
  int64_t n, k, rank;
  int64_t n_pad() const { return round_up<int64_t>(n, kPadN); }
  int64_t k_pad() const { return round_up<int64_t>(k, kStep); }
  int64_t rank_pad() const { return round_up<int64_t>(rank, kStep); }
  int64_t up_begin() const { return rank_pad() * k_pad(); }
  int64_t size() const { return rank_pad() * (k_pad() + n_pad()); }
  Matrix down() const { return {rank, k, k_pad()}; }
  Matrix up() const { return {n, rank, rank_pad()}; }
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

struct Plan;

// `rows` of x and `channels` a block of `warps`. few.cu: the warps share k, each with a ring of `stages`. fused.cu:
// `channels` is also the padded rank. wide.cu: zeros, csrc/cuda/halves.h has what runs.
struct Kernel {
  const char* name;
  Type type;
  int rows, channels, warps, stages;
  Plan (*plan)(const Kernel& kernel, const Factors& shape, int64_t m, int splits);
  void (*run)(const Problem& problem, const Plan& plan);
};
const std::vector<const Kernel*>& cuda_kernels();

// few.cu: one part for each product, `splits` of its k. fused.cu: one part, `splits` of n. wide.cu: one part.
struct Part {
  const Kernel* kernel;
  int splits;
  int64_t blocks;  // of one split
};
struct Plan {
  Part down, up;      // the same but for few.cu
  int64_t workspace;  // bytes
};

Plan plan(const Factors& shape, Type type, int64_t m, int arch, int multiprocessors);
Plan plan(const Kernel& kernel, const Factors& shape, int64_t m, int splits);  // forced

void linear(const Problem& problem, const Plan& plan);

}  // namespace pycompress::low_rank::cuda
