// Packing: canonical 4-bit weights -> panels of 16 channels, in one relocatable buffer; and back.
//
// A unit of 32 positions of a panel takes 256 bytes, eight sets of four positions. Sets 2j and 2j + 1 share 64 bytes,
// which hold channel c's four positions of set 2j in the low nibbles of bytes 4c .. 4c + 3, those of set 2j + 1 in the
// high ones: two instructions turn 32 bytes into the operands of two `vpmaddubsw`.
// Behind the last position a weight is its group's zero point, so that it counts as 0. Behind the last channel all is
// 0.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/round.h"
#include "gemm.h"

namespace pycompress::int4 {

// Where position i of a unit of channel n lies: the byte, and in which half.
constexpr int nibble_byte(int i, int n) { return i / 8 * 64 + n * 4 + i % 4; }
constexpr bool is_high(int i) { return i % 8 >= 4; }
constexpr uint8_t nibble(uint8_t byte, bool high) { return high ? byte >> 4 : byte & 15; }
constexpr int zero_of(const Panel& panel, int group, int n) {
  return panel.zero == nullptr ? kSymmetricZero : nibble(panel.zero[group * kPanel / 2 + n % 8], n >= 8);
}

struct Header {
  char magic[8];
  uint32_t version;
  int32_t n, k, group;
  int32_t symmetric, activation_bits;
  uint32_t checksum;  // of the other fields
  uint32_t reserved;  // 0
  // Byte offsets:
  uint64_t offsets;  // float32 [panels][kPanel]
  uint64_t scales;   // bfloat16 [panels][groups][kPanel]
  uint64_t zeros;    // [panels][groups][kPanel / 2], or 0 where symmetric
  uint64_t deep;     // uint8 [panels]: whether chains of depth 8 fit
  uint64_t nibbles;  // [panels][units][kUnitBytes]
  uint64_t bytes;    // of the whole buffer
  int64_t groups() const { return divide_up(k, group); }
  int64_t units() const { return divide_up(k, kUnit); }
  int64_t panels() const { return divide_up(n, kPanel); }
};
static_assert(sizeof(Header) == 88);

// A weight [n, k] as it is stored (weights/int4.py).
struct Weight {
  const uint8_t* values;      // [n][ceil(k / 2)], position 2j in the low nibble of byte j
  const uint16_t* scale;      // bfloat16 [n][groups]
  const uint8_t* zero_point;  // [n][ceil(groups / 2)], nibbles as in values; null where symmetric
  int64_t n, k;
  int group, activation_bits;  // 8, or 16 for activations that stay floats (csrc/weight_only)
};
std::vector<uint8_t> pack(const Weight& weight, int threads);

// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);

// Units [unit, unit + units) of a panel; unit must begin a group.
Panel panel_of(const uint8_t* packed, const Header& header, int64_t panel, int64_t unit, int64_t units);

// The exact inverse of pack(); what is null is left out.
struct Parts {
  uint8_t* values;
  uint16_t* scale;
  uint8_t* zero_point;
};
void unpack(const uint8_t* packed, int64_t bytes, const Parts& parts);

}  // namespace pycompress::int4
