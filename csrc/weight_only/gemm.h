// Weight-only products: integer weights, activations as they come. The contract; `scalar.cpp` is its specification.
//
//   int8   y[m, n] = act(sum * scale[n] + bias[n])     sum = the sum over k of x[m, k] * w[n, k]
//   int4   y[m, n] = act(sum + bias[n])                w[n, k] = (value - zero point) * scale, exact in float32
//
// Sums are float32, chains of fma in ascending k (up to three rows: in several phases, added at the end of each block
// of kBlockK positions). A result is within
//     gamma(k + 4) * sum_k |x w| + eps (|y| + |bias|)       gamma(q) = q u / (1 - q u), u = 2^-24
// of the exact one before the activation, and does not depend on the threads.
//
// Floors. Many rows: 2 m n k operations at the fp32 FMA peak, for weights are turned into floats once for all rows of a
// task. Few rows: the packed bytes at the read bandwidth; or, for int4, 5 operations for every 8 weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../int4/gemm.h"

namespace pycompress::weight_only {

constexpr int kPanel = 16;  // channels that lie together

// `positions` of a panel as float32 [positions][kPanel]. int8: [positions][kPanel] as packed.
using ExpandInt8 = void (*)(const int8_t* panel, int positions, float* to);
using ExpandInt4 = void (*)(const int4::Panel& panel, float* to);  // whole units

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  ExpandInt8 expand_int8;
  ExpandInt4 expand_int4;
};

Kernels<Kernel>& kernels();  // the floats are multiplied by those of csrc/dense

// y[m, n] for x[m, k] with row stride ldx (elements). `packed`: int8 (pack.h) or int4 (csrc/int4/pack.h).
struct Problem {
  const void* x;
  Type x_type;
  int64_t m, k, ldx;
  const uint8_t* packed;
  int64_t packed_bytes, n;
  const float* weight_scale;  // [n] for int8, null for int4
  const float* bias;
  Activation activation;
  void* y;
  Type y_type;
  int threads;
};
void linear(const Problem& problem);

}  // namespace pycompress::weight_only
