// The specification, and what runs where no other kernel can.
#include <cmath>

#include "../common/activation.h"
#include "../common/float16.h"
#include "divide.h"
#include "kernel_list.h"

namespace pycompress::pool {
namespace {

void add(const void* x, Type type, int64_t d, float mask, float* sums) {
  for (int64_t i = 0; i < d; ++i) sums[i] = sums[i] + float_at(x, type, i) * mask;
}

void finish(float* sums, int64_t d, float count, bool normalize, void* y, Type type) {
  divide<Scalar>(sums, d, count, normalize, [](float x) { return std::sqrt(x); });
  for (int64_t i = 0; i < d; ++i) put_float(y, type, i, sums[i]);
}

}  // namespace

const Kernel kScalar{"scalar", Isa::scalar, 1, 1, 1, add, finish};

}  // namespace pycompress::pool
