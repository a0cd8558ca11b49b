// The windows layout, for int8 weights of which many are zero, such as N of M.
//
// An item is a window of 16 positions, 16 channels wide, of which every channel takes four: `vpshufb` picks each
// channel's own four activations out of the 16 that all share. A window has as many items as its fullest channel needs:
// one for 4:16, two for 4:8 and 2:4. Which weights share a 16-bit lane is free, so they are placed for the lane budget
// (pack.h): lanes are filled evenly, a window gets another item where they overflow all the same, and two items whose
// lanes fit together are added before they are widened.
//
// Floor on Zen 3, per 32 stored weights and row: one shuffle, one `vpmaddubsw`, one add and half of (`vpmaddwd`, add):
// 3.5 operations on four pipes. At 4:16 that is 146 positions a cycle, where fp32 FMA does 16.
//
// One block of a panel:  uint32 pairs, uint32 singles, uint32 items, uint32 0; uint16 offset[items], padded to 64
// bytes;
//                        items of kItemBytes: uint8 picks[32], int8 weights[16][4].
// Byte b < 32 of picks: slot b of channels 0-7 in its low four bits, slot b of channels 8-15 in its high ones.
#pragma once

#include <cstdint>
#include <vector>

namespace pycompress::int8 {

constexpr int kWindow = 16, kItemBytes = 96;

// Appends one block: channels [first, first + 16) x positions [begin, begin + length).
void pack_windows(const int8_t* values, int64_t n, int64_t k, int64_t first, int64_t begin, int64_t length, int amax,
                  std::vector<uint8_t>& out);

// Adds the weights of a block into values[n, k].
void unpack_windows(const uint8_t* block, int64_t n, int64_t k, int64_t first, int64_t begin, int8_t* values);

}  // namespace pycompress::int8
