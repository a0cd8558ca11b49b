// AVX2: eight floats at a time, the sums in the L1; a load, a product, a sum and a store for each: the loads of x bind.
#include "../common/avx2_vector.h"
#include "divide.h"
#include "kernel_list.h"

namespace pycompress::pool {
namespace {

template <Type kType>
void add_as(const void* x, int64_t d, float mask, float* sums) {
  const Vector factor = Vector::of(mask);
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) (Vector::load(sums + i) + Vector{load_floats<kType>(x, i)} * factor).store(sums + i);
  if (i == d) return;
  alignas(32) float products[8];
  (Vector{load_tail<kType>(x, i, static_cast<int>(d - i))} * factor).store(products);
  for (int64_t j = 0; i + j < d; ++j) sums[i + j] += products[j];  // behind them lies 0 * mask, which may be NaN
}

void add(const void* x, Type type, int64_t d, float mask, float* sums) {
  if (type == Type::float32) add_as<Type::float32>(x, d, mask, sums);
  if (type == Type::bfloat16) add_as<Type::bfloat16>(x, d, mask, sums);
  if (type == Type::float16) add_as<Type::float16>(x, d, mask, sums);
}

void finish(float* sums, int64_t d, float count, bool normalize, void* y, Type type) {
  divide<Vector>(sums, d, count, normalize, [](float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); });
  put_floats(sums, d, y, type);
}

}  // namespace

const Kernel kAvx2{"avx2", Isa::avx2, 1, 8, 1, add, finish};

}  // namespace pycompress::pool
