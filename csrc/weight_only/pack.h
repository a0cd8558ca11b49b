// Packing of int8 weights whose activations stay floats: int8 [panels][k][kPanel], zeros behind the last channel, in
// one relocatable buffer; and back. int4 weights lie as csrc/int4/pack.h packs them.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"

namespace pycompress::weight_only {

struct Header {
  char magic[8];
  uint32_t version;
  int32_t n, k;
  uint32_t checksum;  // of the other fields
  uint64_t values;    // byte offset of int8 [panels][k][kPanel]
  uint64_t bytes;     // of the whole buffer
};
static_assert(sizeof(Header) == 40);

std::vector<uint8_t> pack(const int8_t* values, int64_t n, int64_t k);  // values int8 [n, k]

// Whether a buffer begins as one that pack() made: the ops of int8 take those of csrc/int8 too.
bool is_packed(const uint8_t* packed, int64_t bytes);

// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);

// values int8 [n, k], the exact inverse of pack().
void unpack(const uint8_t* packed, int64_t bytes, int8_t* values);

}  // namespace pycompress::weight_only
