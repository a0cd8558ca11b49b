// What the tests of the emulated matrix instructions share: 2:4 sparse weights as a dense matrix, and what is stored of
// them. The metadata's places are those of the PTX ISA's figures (9.1; 9.7.14.6.2 and, of a warp, 9.7.15.6.1).
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "emulate.h"

namespace native {

// Where the two stored elements of a group of four stand: all six pairs come by, in rows as in groups.
inline std::array<int, 2> stored_positions(int row, int group) {
  constexpr std::array<int, 2> kPairs[] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  return kPairs[(row * 5 + group + row / 6) % 6];
}

// An integer from -7 to 7 that every type holds; some stored elements are zero.
inline int element_value(int row, int k) { return (row * 37 + k * 11 + row * k) % 15 - 7; }

inline bool is_stored(int row, int k) {
  const auto [first, second] = stored_positions(row, k / 4);
  return k % 4 == first || k % 4 == second;
}

// Element `i` of what is stored of a row, and of the dense row.
inline int stored_value(int row, int i) {
  return element_value(row, i / 2 * 4 + stored_positions(row, i / 2)[static_cast<size_t>(i % 2)]);
}
inline int dense_value(int row, int k) { return is_stored(row, k) ? element_value(row, k) : 0; }

// Bits 4j to 4j + 3 describe the groups first + j, first + j + 1 .. of a row.
inline uint32_t metadata_bits(int row, int first_group, int groups) {
  uint32_t bits = 0;
  for (int j = 0; j < groups; ++j) {
    const auto [first, second] = stored_positions(row, first_group + j);
    bits |= static_cast<uint32_t>(first | second << 2) << 4 * j;
  }
  return bits;
}

// What `lane` of the warp that has rows [row, row + 16) hands to the instruction for k from `k` on; 0xffffffff, which
// is not valid, where the instruction must not look at it.
inline uint32_t metadata_of_halves(int lane, int row, int k, int selector) {
  if (lane % 4 / 2 != selector) return 0xffffffff;
  const int upper = row + lane / 4, lower = upper + 8, group = k / 4 + lane % 2 * 4;
  return metadata_bits(upper, group, 4) | metadata_bits(lower, group, 4) << 16;
}
inline uint32_t metadata_of_bytes(int lane, int row, int k) {
  constexpr int kRow[] = {0, 8, 0, 8}, kFirst[] = {0, 0, 32, 32};  // of T0 to T3
  return metadata_bits(row + lane / 4 + kRow[lane % 4], (k + kFirst[lane % 4]) / 4, 8);
}

void test_emulation();  // threads, warps and copies
void test_emulation_mma();
void test_emulation_hopper();
void test_emulation_wgmma();

}  // namespace native
