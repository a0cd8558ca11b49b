// The side branch beside the int8 GEMM on CUDA: low rank with an int8 residual, the layer of SVDQuant (Li et al. 2024,
// arXiv:2411.05007): the contract of the op there.
//
//   t[m, r] = sum_k x[m, k] down[r, k], rounded to the type of x and y, float16 or bfloat16
//   y[m, n] = act(((float(acc[m, n]) * sx[m]) * sw[n] + sum_r t[m, r] up[n, r]) + bias[n])
//
// acc, sx and sw are those of csrc/int8/cuda.h, to the bit: x is quantized as it is, whatever the factors take from it.
// The factors are the canonical float32 ones rounded to bfloat16, ties away from zero (to float16 x they are converted,
// exactly from 2^-17 to 65504). With v(c, s) = 2^-23 (17 (c + 1) + s + 8) for a sum of c steps of 16 products in s
// parts (csrc/weight_only/cuda.h) and u = 2^-8 for bfloat16, 2^-11 for float16,
//     |t_r - t64_r| <= d_r = v(2 steps(k), warps(k)) sum_k |x down_r| + u |t64_r|
// to which int8/cuda.h adds the rest. The order of the sums of t follows from k alone, so its bits do not depend on
// what other rows there are. float16: a t beyond 65504 is Inf.
//
// Two launches on the caller's stream, nothing waits: quantize_down() reads x once (rows of more than kHeld positions,
// and those that are not aligned to 16 bytes, twice) and leaves its rows, s and sx as well as t, in the workspace; the
// int8 GEMM takes up its share behind its last block of k. The floor of the first: the bytes of x plus one byte an
// element at the memory's bandwidth, as without a branch; down comes from the L2, once for each kRows rows.
//
// No CUDA header is needed here: the bindings are compiled by the host compiler alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/round.h"
#include "../int8/cuda.h"
#include "cuda.h"

namespace pycompress::low_rank::branch {

using int8::cuda::Stream;

constexpr int kMaxRank = 128;

// --- how quantize_down shares its work: kRows rows a block, whose warps take every warps(k)-th step of k
constexpr int kRows = 16, kStep = 32, kMaxWarps = 16, kHeldSteps = 8;
constexpr int64_t kHeld = int64_t{kMaxWarps} * kHeldSteps * kStep;  // positions of a row that stay in registers

inline int64_t all_steps(int64_t k) { return int8::cuda::PackedShape{1, k}.k_pad() / kStep; }
inline int warps(int64_t k) {
  const int64_t steps = all_steps(k);
  return static_cast<int>(
      std::min<int64_t>(kMaxWarps, std::max(divide_up(steps, kHeldSteps), std::min<int64_t>(steps, 4))));
}
inline int64_t steps(int64_t k) { return divide_up(all_steps(k), warps(k)); }  // of one warp

// The weight is that of the two ops it joins, each as its own packing made it: the factors of csrc/low_rank/cuda.h, of
// which `rank` need be no whole tile here, and the residual of csrc/int8/cuda.h with the scale of its channels.
struct Problem {
  const void* x;
  Type type;       // of x and y: float16 or bfloat16
  int64_t m, ldx;  // ldx: the row stride, elements
  cuda::Factors shape;
  int activation_bits;        // of the residual: 7 or 8
  const uint16_t* factors;    // aligned to 16 bytes
  const uint8_t* residual;    // aligned to 16 bytes
  const float* weight_scale;  // [n]
  const float* bias;          // [n] or null
  Activation activation;
  void* y;             // [m, n], dense
  uint8_t* workspace;  // workspace_bytes(), aligned to kAlign
  Stream stream;
};
constexpr int64_t kAlign = 128;

// What quantize_down leaves in the workspace.
struct Between {
  int8::cuda::Rows rows;
  uint16_t* t;  // [m][shape.rank_pad()], zeros behind the rank
};
int64_t workspace_bytes(const cuda::Factors& shape, int64_t m);
Between between(const cuda::Factors& shape, int64_t m, uint8_t* workspace);

void quantize_down(const Problem& problem);
void linear(const Problem& problem, const int8::cuda::Kernel* forced = nullptr);

}  // namespace pycompress::low_rank::branch
