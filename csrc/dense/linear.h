// Linear layers whose weights are floats that lie as torch keeps them: panels are turned on the way, once for all rows
// of a task, so that nothing is kept beside the weight and a weight that was changed is seen.
//
//   y[m, n] = act(sum_k x[m, k] w[n, k] + bias[n])     one chain of fma a sum, in ascending k (few rows: gemm.h)
//
// Floor: 2 m n k operations at the fp32 FMA peak; turning takes a 16th of that at 96 rows, as much again at 6.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace pycompress::dense {

struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const void* weight;  // [n][k], rows ldw apart
  Type weight_type;
  int64_t ldw, n;
  const float* bias;  // [n] or null
  Activation activation;
  void* y;  // row stride n
  Type y_type;
  int threads;
};
void linear(const Problem& problem);

}  // namespace pycompress::dense
