// Packing: canonical bitmask + values -> the format of one kernel, in one relocatable buffer; and back.
//
// The weight is cut into blocks of `nb` channels x `kb` positions: the tile of x of a block fits the L1. In a block the
// channels (panels of 16 in the panels format) are sorted by their number of elements, so that the kernels' inner loops
// keep their length for a while, and channels without elements are left out (but in the first block of a row of
// blocks, whose sums start there). Within a channel positions ascend.
//
// The formats windows and chains are buffers of the int8 op, which begin where `blocks` says.
//
// One block: uint32 elements, uint16 run_count, uint16 channels; uint16 runs[run_count][2]; uint16 order[channels + 2];
//            padded to 8: values; uint8 index[elements] or [elements][4]; where the header says so, as a second way to
//            the same values, uint8 bits[channels][kb / 8]: which positions they stand at, least significant bit first.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"

namespace pycompress::sparse {

struct Header {
  char magic[8];
  uint32_t version;
  Format format;
  int32_t n, k, nb, kb;
  int32_t width;            // of the widest tile to run
  int32_t activation_bits;  // 7 or 8 for the int8 formats, else 0
  int64_t nonzeros;
  uint64_t column_sums;  // byte offset of int32 [n], int8 formats
  uint64_t blocks;       // byte offset of uint64 [ceil(n / nb)][ceil(k / kb)]: where each block begins
  uint64_t bytes;        // of the whole buffer
  uint32_t checksum;     // of the other fields
  uint32_t has_bits;     // 1: the blocks hold bitmasks, for single rows of x
  int64_t n_blocks() const { return (n + nb - 1) / nb; }
  int64_t k_blocks() const { return (k + kb - 1) / kb; }
};
static_assert(sizeof(Header) == 80);

// The format that is expected to take the least time at many rows, of those that run here. mask as in pack().
Format cheapest(const uint8_t* mask, int64_t n, int64_t k, bool is_float32);
// The format of that name, or the cheapest for an empty one. Throws where it does not hold such values.
Format format_for(const char* name, const uint8_t* mask, int64_t n, int64_t k, bool is_float32);

// mask [n, ceil(k / 8)], least significant bit first; values float or int8 [nonzeros].
std::vector<uint8_t> pack(Format format, const uint8_t* mask, const void* values, int64_t n, int64_t k,
                          int64_t nonzeros, int activation_bits, int threads);

bool is_packed(const uint8_t* packed, int64_t bytes);  // whether the buffer is of this op at all
// Throws std::invalid_argument where the buffer is not one that pack() made.
const Header& header_of(const uint8_t* packed, int64_t bytes);
Block block_of(const uint8_t* packed, const Header& header, int64_t n_block, int64_t k_block);

// The exact inverse of pack(): mask and values.
void unpack(const uint8_t* packed, int64_t bytes, uint8_t* mask, void* values);

}  // namespace pycompress::sparse
