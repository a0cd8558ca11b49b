// The gates, written once over a vector type V, with whose load_up_to(p, count) and store_up_to(p, v, count) this file
// is included. In an anonymous namespace, because each instruction-set file compiles its own copy.
#pragma once

#include "../common/activation.h"

namespace pycompress::recurrent {
namespace {

// u where it is finite or NaN; far outside of what the functions below tell apart, a number instead of Inf.
template <class V>
inline V bounded(V u) {
  const V most = V::of(128.0f), least = V::of(-128.0f);
  const V low = where_less(most, u, most, u);
  return where_less(low, least, least, low);
}

// The exponential of a NaN is 1, so it is added: 0 of all numbers.
template <class V>
inline V sigmoid(V u) {
  const V v = bounded(u);
  return times_sigmoid(V::of(1.0f), v) + (v - v);
}

template <class V>
inline V hyperbolic_tangent(V u) {
  const V v = bounded(u);
  const V e = exp_negative(negated_absolute(v) * V::of(2.0f));
  const V positive = (V::of(1.0f) - e) / (V::of(1.0f) + e);
  return where_less(v, V::of(0.0f), V::of(0.0f) - positive, positive) + (v - v);
}

template <class V>
inline void lstm_units(const float* gx, const float* gh, int64_t size, float* c, float* h, float* y) {
  for (int64_t j = 0; j < size; j += V::kWidth) {
    const int count = static_cast<int>(size - j < V::kWidth ? size - j : V::kWidth);
    const auto gate = [&](int64_t g) {
      const int64_t at = g * size + j;
      return load_up_to(gx + at, count) + load_up_to(gh + at, count);
    };
    const V input = sigmoid(gate(0)), forget = sigmoid(gate(1));
    const V fresh = hyperbolic_tangent(gate(2)), output = sigmoid(gate(3));
    const V cell = forget * load_up_to(c + j, count) + input * fresh;
    const V hidden = output * hyperbolic_tangent(cell);
    store_up_to(c + j, cell, count);
    store_up_to(h + j, hidden, count);
    store_up_to(y + j, hidden, count);
  }
}

template <class V>
inline void gru_units(const float* gx, const float* gh, int64_t size, float* h, float* y) {
  for (int64_t j = 0; j < size; j += V::kWidth) {
    const int count = static_cast<int>(size - j < V::kWidth ? size - j : V::kWidth);
    const auto x = [&](int64_t g) { return load_up_to(gx + g * size + j, count); };
    const auto hidden = [&](int64_t g) { return load_up_to(gh + g * size + j, count); };
    const V reset = sigmoid(x(0) + hidden(0)), update = sigmoid(x(1) + hidden(1));
    const V fresh = hyperbolic_tangent(x(2) + reset * hidden(2));
    const V next = (load_up_to(h + j, count) - fresh) * update + fresh;
    store_up_to(h + j, next, count);
    store_up_to(y + j, next, count);
  }
}

}  // namespace
}  // namespace pycompress::recurrent
