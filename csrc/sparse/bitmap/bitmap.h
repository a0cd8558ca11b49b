// The packed sparse weights of the CUDA kernels: bitmaps and non-zeros, in the order in which the lanes of a warp need
// them (in the manner of SpInfer, Fan et al., EuroSys 2025). Plain index arithmetic.
//
// A unit holds 32 channels x 64 positions: eight tiles of 16 x 16, two beside each other in n for each 16 positions. In
// a tile, register r of lane i of an A fragment of mma.m16n8k16 (csrc/weight_only/shuffle.h) has two weights, and half
// h = i / 16 of the lanes has 32: a word of a bitmap says which are not zero, bit 2 (i % 16) + e for weight e. Values
// stand in the order of tile, register, half, bit.
//   uint32 bits[8 tiles][2 halves][4 registers]
//   uint8  before[8 tiles][2 halves][4 registers]   values of the tile in front of those of the word
//   uint16 first[8 tiles]                           values of the unit in front of those of the tile
//   uint16 values[]                                 bfloat16 or float16; filler up to 16 bytes
// The buffer: uint32 index[units + 1], in chunks of 16 bytes from its begin, filler up to 16 bytes; units of the same
// channels one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/host_device.h"
#include "../../common/round.h"
#include "../../common/types.h"

namespace pycompress::sparse::cuda {

constexpr int kUnitN = 32, kUnitK = 64, kTilesOfUnit = 8;
constexpr int kBefore = 256, kFirst = kBefore + 64, kValues = kFirst + 16;  // byte offsets in a unit
constexpr int kChunk = 16;
constexpr int kLargestUnit = kValues + kUnitN * kUnitK * 2;

struct Position {
  int n, k;  // within a unit
};

// Weight `e` of register `reg` of a lane in a tile.
PYCOMPRESS_HOST_DEVICE constexpr Position position_of(int tile, int reg, int lane, int e) {
  return {tile % 2 * 16 + lane / 4 + reg % 2 * 8, tile / 2 * 16 + reg / 2 * 8 + lane % 4 * 2 + e};
}

inline int64_t units_across(int64_t k) { return divide_up(k, kUnitK); }
inline int64_t units_of(int64_t n, int64_t k) { return round_up<int64_t>(n, 2 * kUnitN) / kUnitN * units_across(k); }

// A packed weight [n, k].
struct Shape {
  Type type;  // of its values: float16 or bfloat16
  int64_t n, k;
  int64_t bytes;   // of the buffer
  int unit_bytes;  // of its largest unit
};
void check_shape(const Shape& shape);  // throws where no buffer can be so

struct Packed {
  Shape shape;
  std::vector<uint8_t> bytes;
};
// A canonical weight (weights/sparse.py): mask uint8 [n][ceil(k / 8)], values in the order of its bits, already of
// `type`, float16 or bfloat16; count: how many there are.
Packed pack_bitmap(const uint8_t* mask, const uint16_t* values, int64_t count, Type type, int64_t n, int64_t k);

}  // namespace pycompress::sparse::cuda
