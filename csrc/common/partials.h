// Sums over a row in an order that every instruction set can keep: 32 partials, element i in partial i % 32, ascending,
// which are then added by halves. Rows are padded with zeros to a multiple of 32. Written once over a vector type V.
#pragma once

#include <cstdint>

namespace pycompress {
namespace {

constexpr int kPartials = 32;

// sum_i f(i), f(i) the V of elements [i, i + V::kWidth).
template <class V, class F>
inline float sum_in_partials(int64_t padded, F&& f) {
  constexpr int count = kPartials / V::kWidth;
  V part[count];
  for (int j = 0; j < count; ++j) part[j] = V::of(0.0f);
  for (int64_t i = 0; i < padded; i += kPartials)
    for (int j = 0; j < count; ++j) part[j] = part[j] + f(i + j * V::kWidth);
  alignas(32) float sums[kPartials];
  for (int j = 0; j < count; ++j) part[j].store(sums + j * V::kWidth);
  for (int half = kPartials / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

}  // namespace
}  // namespace pycompress
