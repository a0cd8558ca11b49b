// The activations of the epilogue, written once over a vector type V so that every kernel rounds alike:
// plain multiply and add in a fixed order, no fma. Everything is in an anonymous namespace, because each
// instruction-set file compiles its own copy and the linker must not merge them.
//
// V offers + - * / on itself, V::of(float), where_less(a, b, yes, no) and power_of_two(n).
#pragma once

#include <cstring>

#include "host_device.h"
#include "types.h"

namespace pycompress {
namespace {

struct Scalar {
  static constexpr int kWidth = 1;
  float value;
  PYCOMPRESS_HOST_DEVICE static Scalar of(float v) { return {v}; }
  static Scalar load(const float* p) { return {*p}; }
  void store(float* p) const { *p = value; }
};
PYCOMPRESS_HOST_DEVICE inline Scalar operator+(Scalar a, Scalar b) { return {a.value + b.value}; }
PYCOMPRESS_HOST_DEVICE inline Scalar operator-(Scalar a, Scalar b) { return {a.value - b.value}; }
PYCOMPRESS_HOST_DEVICE inline Scalar operator*(Scalar a, Scalar b) { return {a.value * b.value}; }
PYCOMPRESS_HOST_DEVICE inline Scalar operator/(Scalar a, Scalar b) { return {a.value / b.value}; }
PYCOMPRESS_HOST_DEVICE inline Scalar where_less(Scalar a, Scalar b, Scalar yes, Scalar no) {
  return a.value < b.value ? yes : no;
}
PYCOMPRESS_HOST_DEVICE inline Scalar power_of_two(Scalar n) {  // 2^n for integral n in [-126, 127]
  const int32_t bits = (static_cast<int32_t>(n.value) + 127) << 23;
  Scalar result;
  std::memcpy(&result.value, &bits, 4);
  return result;
}

// exp(x) for x <= 0, within 2 ulp down to exp(-87) and 0 below; the polynomial is the Taylor series up to r^7 on
// |r| <= ln(2)/2, whose remainder is under 6e-9. NaN gives 1: the caller multiplies by something that carries it.
template <class V>
PYCOMPRESS_HOST_DEVICE inline V exp_negative(V x) {
  const V floor = V::of(-87.0f);
  const V clamped = where_less(floor, x, x, floor);
  const V magic = V::of(0x1.8p23f);
  const V n = (clamped * V::of(1.44269504f) + magic) - magic;
  const V r = (clamped - n * V::of(0.693359375f)) - n * V::of(-2.12194440e-4f);  // ln 2 in two parts
  V p = V::of(1.0f / 5040.0f);
  p = p * r + V::of(1.0f / 720.0f);
  p = p * r + V::of(1.0f / 120.0f);
  p = p * r + V::of(1.0f / 24.0f);
  p = p * r + V::of(1.0f / 6.0f);
  p = p * r + V::of(0.5f);
  p = (p * r) * r + r + V::of(1.0f);
  return where_less(floor, x, p * power_of_two(n), V::of(0.0f));
}

template <class V>
PYCOMPRESS_HOST_DEVICE inline V negated_absolute(V x) {
  return where_less(V::of(0.0f), x, V::of(0.0f) - x, x);
}

// v * sigmoid(u), from exp(-|u|) so that nothing overflows.
template <class V>
PYCOMPRESS_HOST_DEVICE inline V times_sigmoid(V v, V u) {
  const V e = exp_negative(negated_absolute(u));
  const V positive = v / (V::of(1.0f) + e);
  return where_less(u, V::of(0.0f), positive * e, positive);
}

// 0.5 v (1 + erf(v / sqrt 2)), erf after Abramowitz and Stegun 7.1.26 (absolute error of erf below 1.5e-7).
template <class V>
PYCOMPRESS_HOST_DEVICE inline V gelu(V v) {
  const V s = negated_absolute(v) * V::of(0.707106781f);  // -|v| / sqrt 2
  const V t = V::of(1.0f) / (V::of(1.0f) - s * V::of(0.3275911f));
  V p = V::of(1.061405429f);
  p = p * t + V::of(-1.453152027f);
  p = p * t + V::of(1.421413741f);
  p = p * t + V::of(-0.284496736f);
  p = p * t + V::of(0.254829592f);
  const V half_tail = ((p * t) * exp_negative(V::of(0.0f) - s * s)) * V::of(0.5f);  // (1 - erf |v| / sqrt 2) / 2
  return v * where_less(v, V::of(0.0f), half_tail, V::of(1.0f) - half_tail);
}

template <class V>
PYCOMPRESS_HOST_DEVICE inline V from_0_to_6(V x) {  // NaN stays NaN
  const V zero = V::of(0.0f), six = V::of(6.0f);
  return where_less(x, zero, zero, where_less(six, x, six, x));
}

template <class V>
PYCOMPRESS_HOST_DEVICE inline V activate(Activation activation, V v) {
  const V zero = V::of(0.0f);
  switch (activation) {
    case Activation::none:
      return v;
    case Activation::relu:
      return where_less(v, zero, zero, v);  // NaN stays NaN
    case Activation::gelu:
      return gelu(v);
    case Activation::relu6:
      return from_0_to_6(v);
    case Activation::hardswish:  // these steps are torch's: the same bits
      return (v * from_0_to_6(v + V::of(3.0f))) / V::of(6.0f);
    default:
      break;
  }
  V u = v;  // silu; the three share the sigmoid, which takes registers of a kernel's epilogue
  if (activation == Activation::gelu_tanh)  // 0.5 v (1 + tanh u) = v sigmoid(2u)
    u = V::of(1.59576912f) * (v + V::of(0.044715f) * ((v * v) * v));
  else if (activation == Activation::quick_gelu)
    u = V::of(1.702f) * v;
  return times_sigmoid(v, u);
}

}  // namespace
}  // namespace pycompress
