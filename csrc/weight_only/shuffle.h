// The packed weight-only weights of the CUDA kernels: where each value lies. Plain index arithmetic, for the device's
// packer and the host's tests alike.
//
// The kernels compute y^T = W x^T with mma.m16n8k16, the weights as its A operand: a lane then holds of a tile of 16
// channels x 16 positions, with g = lane / 4 and t = lane % 4,
//     register 0: channel g,     positions 2t, 2t + 1        register 2: channel g,     positions 2t + 8, 2t + 9
//     register 1: channel g + 8, positions 2t, 2t + 1        register 3: channel g + 8, positions 2t + 8, 2t + 9
// Weights lie in blocks of 32 channels x 32 positions (two tiles by two), blocks of the same channels one after the
// other; 16 bytes of one lane beside those of the next. So a warp's copies are whole runs of 512 bytes, a lane reads
// back its own bytes alone, and what it reads becomes its registers by masks and no shuffles (as Kim et al. 2022,
// arXiv:2211.10017, and Frantar et al. 2024, arXiv:2408.11743, lay out theirs):
//   int8   [tile of 16 channels][lane][16]: eight bytes for each 16 positions; value + 128. A word holds registers r
//   and
//          r + 1: the even bytes are r's two positions, the odd ones r + 1's.
//   int4   [lane][tile of 16 channels][8]: a word for each 16 positions. Nibble r and r + 4 are the two positions of
//          register r.
// Beside the int4 weights, for each 32 channels and each group, in memory order of the groups: bfloat16 scale[8][4],
// channel c at [c % 8][c / 8]; then, where there are zero points, bytes [8][2]: of channel c in byte [c % 8][c / 16],
// the low nibble where c / 8 is even.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/round.h"

namespace pycompress::weight_only::cuda {

enum class Bits : int { eight = 8, four = 4 };

constexpr int kBlockN = 32, kBlockK = 32;         // of one block of weights
constexpr int kPadN = 64;                         // channels that a block of threads may take at once
constexpr int kStep = 64;                         // positions that a warp takes at once
constexpr int kScaleBytes = 64, kZeroBytes = 16;  // of 32 channels and one group

struct Position {
  int n, k;  // within a block of weights
};

// Which weight is byte `i` of a block of int8 weights.
PYCOMPRESS_HOST_DEVICE constexpr Position byte_position(int i) {
  const int tile = i / 512, lane = i / 16 % 32, half = i / 8 % 2, word = i / 4 % 2, j = i % 4;
  return {tile * 16 + lane / 4 + j % 2 * 8, half * 16 + word * 8 + lane % 4 * 2 + j / 2};
}

// Which weight is nibble `i` of a block of int4 weights; nibble 0 of a byte is the low one.
PYCOMPRESS_HOST_DEVICE constexpr Position nibble_position(int i) {
  const int lane = i / 32, tile = i / 16 % 2, half = i / 8 % 2, j = i % 8, reg = j % 4;
  return {tile * 16 + lane / 4 + reg % 2 * 8, half * 16 + reg / 2 * 8 + lane % 4 * 2 + j / 4};
}

// The inverses.
PYCOMPRESS_HOST_DEVICE constexpr int byte_index(Position p) {
  const int lane = p.n % 8 * 4 + p.k % 8 / 2;
  return p.n / 16 * 512 + lane * 16 + p.k / 16 * 8 + p.k / 8 % 2 * 4 + p.k % 2 * 2 + p.n / 8 % 2;
}
PYCOMPRESS_HOST_DEVICE constexpr int nibble_index(Position p) {
  const int lane = p.n % 8 * 4 + p.k % 8 / 2;
  return lane * 32 + p.n / 16 * 16 + p.k / 16 * 8 + p.k % 2 * 4 + p.k / 8 % 2 * 2 + p.n / 8 % 2;
}

// Where a channel's scale (in bfloat16s) and zero point (in nibbles, behind the scales) lie among those of its group.
PYCOMPRESS_HOST_DEVICE constexpr int scale_index(int channel) { return channel % 8 * 4 + channel / 8; }
PYCOMPRESS_HOST_DEVICE constexpr int zero_index(int channel) {
  return channel % 8 * 4 + channel / 16 * 2 + channel / 8 % 2;
}

// A packed weight [n, k].
struct Packed {
  Bits bits;
  int64_t n, k;
  int group = 0;  // int4: 32, 64 or 128
  bool symmetric = true;

  PYCOMPRESS_HOST_DEVICE int64_t n_pad() const { return (n + kPadN - 1) / kPadN * kPadN; }
  PYCOMPRESS_HOST_DEVICE int64_t k_pad() const { return (k + kStep - 1) / kStep * kStep; }
  PYCOMPRESS_HOST_DEVICE int64_t groups() const { return bits == Bits::eight ? 0 : (k + group - 1) / group; }
  PYCOMPRESS_HOST_DEVICE int block_bytes() const { return kBlockN * kBlockK * static_cast<int>(bits) / 8; }
  PYCOMPRESS_HOST_DEVICE int group_bytes() const { return kScaleBytes + (symmetric ? 0 : kZeroBytes); }
  // Byte offsets.
  PYCOMPRESS_HOST_DEVICE int64_t weights(int64_t block_n, int64_t block_k) const {
    return (block_n * (k_pad() / kBlockK) + block_k) * block_bytes();
  }
  PYCOMPRESS_HOST_DEVICE int64_t scales(int64_t block_n, int64_t group_index) const {
    return n_pad() * k_pad() * static_cast<int>(bits) / 8 + (block_n * groups() + group_index) * group_bytes();
  }
  PYCOMPRESS_HOST_DEVICE int64_t bytes() const { return scales(n_pad() / kBlockN, 0); }
};

}  // namespace pycompress::weight_only::cuda
