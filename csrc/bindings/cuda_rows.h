// The workspace in which the int8 ops of _cuda hand quantized rows from one launch to the next.
#pragma once

#include "../int8/cuda.h"
#include "python.h"

namespace pycompress {

// s [m][k_pad], scale [m], zero_point [m].
inline int64_t rows_bytes(int64_t m, int64_t k) { return m * (int8::cuda::PackedShape{1, k}.k_pad() + 8); }

inline int8::cuda::Rows rows_in(uintptr_t workspace, int64_t m, int64_t k) {
  auto* s = pointer<int8_t>(workspace);
  auto* scale = reinterpret_cast<float*>(s + m * int8::cuda::PackedShape{1, k}.k_pad());
  return {s, scale, reinterpret_cast<int32_t*>(scale + m)};
}

// Quantizes x [m, k], row stride ldx, into the workspace.
inline int8::cuda::Rows quantized_rows(uintptr_t x, int x_type, int64_t m, int64_t k, int64_t ldx, int activation_bits,
                                       uintptr_t workspace, int8::cuda::Stream stream) {
  int8::cuda::Input input{};
  input.x = pointer<const void>(x);
  input.type = static_cast<Type>(x_type);
  input.m = m, input.k = k, input.ldx = ldx;
  input.activation_bits = activation_bits;
  const int8::cuda::Rows rows = rows_in(workspace, m, k);
  int8::cuda::quantize(input, rows, stream);
  return rows;
}

}  // namespace pycompress
