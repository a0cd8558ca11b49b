// Low-rank linear: the contract of the op. Its products are those of csrc/dense, and of the residual's own op.
//
//   y[m, n] = act(x down^T up^T + x R^T + bias)      down [r, k], up [n, r]; R [n, k]: the residual, or nothing
//
//   float32 factors   t[m, r] = fma(x[m, k], down[r, k], t) in ascending k, starting at 0
//                     l[m, n] = fma(t[m, r], up[n, r], l) in ascending r, starting at bias[n]
//   int8 factors      t = int8_linear(x, down), float32; l = int8_linear(t, up) + bias (csrc/int8/gemm.h), to the bit:
//                     each row of t is quantized again
//   residual          none      y = act(l)
//                     float32   y = act(l), l going on: fma(x[m, k], R[n, k], l) in ascending k
//                     int8      y = act((float(acc) * sx) * sw + l), acc and sx as in int8_linear
//                     int4      the same with u of int4_linear (csrc/int4/gemm.h) in place of acc: y = act(u * sx + l)
//                     sparse    the same with the sums of sparse_linear, int8 or float32 (csrc/sparse/gemm.h)
//
// Up to three rows (kFewRows) the chains of the float32 products run in several phases, which are added at the end. A
// float32 result is within
//     gamma(k + r + 4) * sum_j (sum_i |x_i down_ji|) |up_nj| + gamma(r + 4) |bias|
// of the exact one, gamma(q) = q u / (1 - q u), u = 2^-24 (the second chain starts at the bias; a float32 residual
// makes it k longer: gamma(2k + r + 4), gamma(k + r + 4)), plus what the residual and the rounding to y add. It does
// not depend on the threads.
//
// Floors: 2 m r (n + k) operations at the fp32 FMA peak (int8 factors: at the integer peak), plus the residual's own;
// or the packed bytes at the read bandwidth, which one row is bound by. x, t and y of a task stay in the L2: a task
// has some rows and takes them through both products (int8 factors beside a residual: l too, at 4 n bytes a row).
//
// Two products of MKL through torch, interleaved (benchmarks/kernels.py --op low_rank): behind up to 128 rows, even at
// 512 (0.96 to 1.12 of our time). It is not called: it would need the factors a second time, and the second dispatch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dense/gemm.h"

namespace pycompress::low_rank {

using dense::kFewRows;
using dense::kPanel;

// y[m, n] for x[m, k] with row stride ldx (elements). `packed` is what pack() made. y is dense, row stride n.
struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* bias;
  Activation activation;
  void* y;
  Type y_type;
  float* intermediate;  // t [m, r], or null: where the caller wants it too
  int threads;
};
void linear(const Problem& problem);

}  // namespace pycompress::low_rank
