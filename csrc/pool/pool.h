// A sentence as the mean of its tokens. The contract; `scalar.cpp` is its specification, and every kernel gives its
// bits.
//
//   v[b, :] = (sum_l x[b, l, :] * mask[b, l]) / max(sum_l mask[b, l], 1e-9)       in float32, ascending l
//   y[b, :] = v, or v / max(|v|, 1e-12), rounded once to the type of y
//
// |v| = sqrt(sum v^2), the sum as common/partials.h has it, products and sums apart. What the mask leaves out is
// multiplied by 0 all the same: NaN and Inf there are not hidden.
//
// Floor: x at the read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace pycompress {
template <class Kernel>
class Kernels;
}

namespace pycompress::pool {

enum class Mask : int { none, boolean, int32, int64, float32 };

struct Problem {
  const void* x;  // [batch, length, d], strides in elements
  Type type;
  int64_t batch, length, d;
  ptrdiff_t of_batch, of_position;
  Mask mask_type;
  const void* mask;  // [batch, length]
  ptrdiff_t mask_of_batch, mask_of_position;
  bool normalize;
  void* y;  // [batch, d], of x's type
  int threads;
};

void mean(const Problem& problem);

struct Kernel {
  const char* name;
  Isa isa;
  int mr, nr, kr;
  // sums[d] += x[d] * mask
  void (*add)(const void* x, Type type, int64_t d, float mask, float* sums);
  // y[d] = sums / count, normalized or not; sums are padded with zeros to a multiple of kPartials, and lost
  void (*finish)(float* sums, int64_t d, float count, bool normalize, void* y, Type type);
};
Kernels<Kernel>& kernels();

}  // namespace pycompress::pool
