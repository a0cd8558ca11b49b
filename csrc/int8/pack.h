// Packing: canonical int8 [n, k] -> the layout of one kernel, in one relocatable buffer; and back.
//
// The chains layout, for AVX2 without VNNI. `vpmaddubsw` adds two u8 * s8 products into a 16-bit lane and saturates.
// The weights are known here, so saturation is ruled out here: a lane that adds up d of those results holds 2d weights,
// and no activation in [0, amax] overflows it if
//     amax * (sum of its positive weights) <= 32767  and  amax * (sum of its negative ones) >= -32768.
// That lane budget (258 for 7-bit activations, 128 for 8-bit ones) decides which groups of four positions may form a
// chain of depth 4 or 2, added with plain 16-bit adds and widened once, and which stay alone. Which groups meet in a
// chain is free (the kernel reads the activations through offsets), so they are matched here until the budget holds. A
// group that breaks the budget even alone is split into two whose weights add up to it, one of zeros is left out. Every
// sum is exact.
//
// One block of a panel:  uint32 chains[3] (depth 4, 2, 1), uint32 items; uint16 offset[items], padded to 64 bytes;
//                        int8 weights[items][nr][4].   An offset is that of the group's bytes in the activation block.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"

namespace pycompress::int8 {

constexpr int kDepths[3] = {4, 2, 1};

struct Header {
  char magic[8];
  uint32_t version;
  Layout layout;
  int32_t n, k, nr, activation_bits;
  int32_t versions;      // reorderings of the activations that the offsets refer to: 1 or kVersions
  uint32_t checksum;     // of the other fields
  uint32_t input_scale;  // the bits of the float; 0 where each row of x has its own range
  int32_t input_zero_point;
  uint64_t column_sums;  // byte offset of int32 [panels * nr]
  uint64_t blocks;       // byte offset of uint64 [panels * blocks]: where each block of each panel begins
  uint64_t bytes;        // of the whole buffer
};
static_assert(sizeof(Header) == 72);

// `range`: that of the input where it is static, or null.
std::vector<uint8_t> pack(const Kernel& kernel, const int8_t* values, int64_t n, int64_t k, int activation_bits,
                          int threads, const Range* range = nullptr);

// Throws std::invalid_argument where a range is none for activations of so many bits; `op`: who asks.
void check_range(const char* op, const Range& range, int activation_bits);

Range range_of(const Header& header);

// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);

// values int8 [n, k], the exact inverse of pack().
void unpack(const uint8_t* packed, int64_t bytes, int8_t* values);

// How the work is spread over the depths: items[d] is the number of groups in chains of depth 4, 2, 1.
struct Depths {
  int64_t items[3];
  int64_t groups;  // ceil(k / 4) * panels; more items are splits, fewer were zero
};
Depths depths(const uint8_t* packed, int64_t bytes);

}  // namespace pycompress::int8
