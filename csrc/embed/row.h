// A row of the result, written once over a vector type V. add(x, type, d, sums, first) adds the floats of a row to
// sums, or puts them there; put(sums, d, y, type) rounds them.
#pragma once

#include "../common/partials.h"
#include "embed.h"

namespace pycompress::embed {
namespace {

template <class V, class Root>
inline void normalize(const Row& row, Root&& root) {
  float* s = row.sums;
  const int64_t padded = (row.d + kPartials - 1) / kPartials * kPartials;
  const auto size = static_cast<float>(row.d);
  const V mean = V::of(sum_in_partials<V>(padded, [&](int64_t i) { return V::load(s + i); }) / size);
  for (int64_t i = 0; i < padded; i += V::kWidth) (V::load(s + i) - mean).store(s + i);
  for (int64_t i = row.d; i < padded; ++i) s[i] = 0.0f;
  const float squares = sum_in_partials<V>(padded, [&](int64_t i) { return V::load(s + i) * V::load(s + i); });
  const V factor = V::of(1.0f / root(squares / size + row.eps));
  for (int64_t i = 0; i < padded; i += V::kWidth)
    ((V::load(s + i) * factor) * V::load(row.weight + i) + V::load(row.shift + i)).store(s + i);
  for (int64_t i = row.d; i < padded; ++i) s[i] = 0.0f;  // NaN * 0
}

}  // namespace
}  // namespace pycompress::embed
