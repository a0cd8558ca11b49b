// What the matrix instructions of a warp and of a warp group have in common: 16 rows of 32 bytes of A, dense or 2:4
// sparse, times columns of B. Shared by emulate_mma.cpp and emulate_wgmma.cpp.
#pragma once

#include "emulate.h"

namespace emulate {

// The other type's values, and all products of both, are exact in double.
inline double widened(const uint8_t* element, Element type) {
  if (type == Element::s8) return static_cast<int8_t>(*element);
  uint16_t bits;
  std::memcpy(&bits, element, 2);
  if (type == Element::bf16) return pycompress::gpu::float_of(static_cast<uint32_t>(bits) << 16);
  __half_raw raw{};
  raw.x = bits;
  return __half2float(__half(raw));
}
constexpr int element_bytes(Element type) { return type == Element::s8 ? 1 : 2; }

using Sixteen __attribute__((vector_size(16 * sizeof(double)))) = double;  // one for each row

// 16 rows of A, element by element: what is stored, and which k it stands for.
struct Rows {
  int count = 0;  // 32 bytes' worth
  bool sparse = false;
  Sixteen value[32];
  int k[32][16];
};
Rows dense_rows(const uint8_t (&bytes)[16][32], Element type);
// Their positions are in the metadata of the warp's lanes (9.7.14.6.2, 9.7.15.6.1).
Rows sparse_rows(const uint8_t (&bytes)[16][32], Element type, const uint32_t (&metadata)[32], int selector);

// Each row's sum over its elements by those of B that they meet; what lies at the other k of B is not looked at: it may
// be NaN.
void multiply(const Rows& rows, const double* column, Sixteen& products);

// sum + product in the type of the sums: int32, wrapping, or float32. Rounded once, while the device's may differ in
// the last places (9.7.14.5.14).
inline uint32_t added(uint32_t sum, double product, Element type) {
  if (type == Element::s8) return sum + static_cast<uint32_t>(static_cast<int32_t>(product));
  return pycompress::gpu::bits_of(static_cast<float>(pycompress::gpu::float_of(sum) + product));
}

}  // namespace emulate
