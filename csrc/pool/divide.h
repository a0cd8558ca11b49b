// The mean of a sum, and its length; written once over a vector type V.
#pragma once

#include <cstdint>

#include "../common/partials.h"

namespace pycompress::pool {
namespace {

template <class V, class Root>
inline void divide(float* sums, int64_t d, float count, bool normalize, Root&& root) {
  const int64_t padded = (d + kPartials - 1) / kPartials * kPartials;
  const auto by = [&](float divisor) {
    for (int64_t i = 0; i < padded; i += V::kWidth) (V::load(sums + i) / V::of(divisor)).store(sums + i);
  };
  by(count < 1e-9f ? 1e-9f : count);
  for (int64_t i = d; i < padded; ++i) sums[i] = 0.0f;  // 0 / NaN
  if (!normalize) return;
  const float length =
      root(sum_in_partials<V>(padded, [&](int64_t i) { return V::load(sums + i) * V::load(sums + i); }));
  by(length < 1e-12f ? 1e-12f : length);
}

}  // namespace
}  // namespace pycompress::pool
