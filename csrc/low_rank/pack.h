// Packing: the factors, and what the residual's own op packed, in one relocatable buffer; and back.
//
// float32 matrices lie in panels (csrc/dense/pack.h); int8 factors and an int8, int4 or sparse residual are buffers of
// their own ops (csrc/int8/pack.h, ...) inside this one.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"

namespace pycompress::low_rank {

enum class Residual : uint32_t { none = 0, dense = 1, int8 = 2, sparse = 3, int4 = 4 };
constexpr int kResiduals = 5;
const char* residual_name(Residual residual);

// Where a part of the buffer lies. No bytes: it is not there.
struct Part {
  uint64_t offset, bytes;
};

struct Header {
  char magic[8];
  uint32_t version;
  Residual residual_kind;
  int32_t n, k, rank, bits;  // of the factors: 32 or 8
  int32_t activation_bits;   // 7 or 8 for int8 factors, else 0
  uint32_t checksum;         // of the other fields
  Part down, up, down_scale, up_scale, residual, residual_scale;
  uint64_t bytes;  // of the whole buffer
};
static_assert(sizeof(Header) == 144);

// A weight [n, k] that is not packed yet.
struct Weight {
  const void *down, *up;  // float or int8: [rank, k], [n, rank]
  int64_t n, k, rank;
  int bits, activation_bits;
  const float *down_scale, *up_scale;  // [rank], [n] for int8, else null
  Residual residual_kind;
  const void* residual;  // float [n, k], or what its op packed
  int64_t residual_bytes;
  const float* residual_scale;  // [n] for int8 and for sparse int8 values, else null
};
std::vector<uint8_t> pack(const Weight& weight, int threads);

// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);

// The exact inverse of pack(): the parts into memory of the sizes above, those that are null left out.
struct Parts {
  void *down, *up;
  float *down_scale, *up_scale;
  void* residual;
  float* residual_scale;
};
void unpack(const uint8_t* packed, int64_t bytes, const Parts& parts);

}  // namespace pycompress::low_rank
