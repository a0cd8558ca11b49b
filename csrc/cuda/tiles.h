// Index arithmetic of the CUDA kernels, in plain C++ that host tests run: where bytes lie in shared memory, which lane
// reads which, which block computes which tile, and which kernel takes a problem.
#pragma once

#include <cstdint>

#include "../common/host_device.h"
#include "../common/round.h"

namespace pycompress::gpu {

// --- shared memory: rows of kBk bytes, in chunks of 16
// ------------------------------------------------------------------ ldmatrix reads a chunk from each of eight rows
// that follow each other; they must lie in different banks (128 bytes). So the chunk's number is combined with the
// row's by exclusive or: with all eight chunks of a row of 128 bytes, or with the four of a row of 64 bytes, of which
// two share a line.
template <int kBk>
PYCOMPRESS_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  static_assert(kBk == 64 || kBk == 128);
  return row * kBk + 16 * (kBk == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3));
}

struct Chunk {
  int row, chunk;  // of the operand's 16 or 8 rows; chunk 0 or 1 of the 32 bytes that one mma takes
};
// What lane `lane` hands to load_matrices, so that mma_s8 finds its a[0..3] for 16 rows of x,
PYCOMPRESS_HOST_DEVICE constexpr Chunk chunk_of_rows(int lane) { return {lane & 15, lane >> 4}; }
// and its b[0], b[1] for 8 channels, then for the next 8.
PYCOMPRESS_HOST_DEVICE constexpr Chunk chunk_of_channels(int lane) {
  return {(lane & 7) | (lane >> 4) << 3, lane >> 3 & 1};
}

// --- which tile a block computes
// ----------------------------------------------------------------------------------------
struct Position {
  int64_t m, n;  // of the tile, in tiles
};
// Blocks run roughly in order: those that run at the same time share rows of x and channels where they form a square
// rather than a line, and find them in the L2. So kGroup tiles of m are taken together.
constexpr int kGroup = 8;
PYCOMPRESS_HOST_DEVICE inline Position tile_at(int64_t index, int64_t tiles_m, int64_t tiles_n) {
  // 32 bits are enough for what one launch has, and are divided many times faster.
  const auto i = static_cast<uint32_t>(index), m = static_cast<uint32_t>(tiles_m), n = static_cast<uint32_t>(tiles_n);
  const uint32_t first = i / (kGroup * n) * kGroup, rest = m - first, height = rest < kGroup ? rest : kGroup;
  const uint32_t inside = i - first * n;
  return {first + inside % height, inside / height};
}

// --- which kernel
// ------------------------------------------------------------------------------------------------------- Code for 9.0a
// runs on 9.0 alone.
template <class Kernel>
inline bool runs_on(const Kernel& kernel, int arch) {
  return kernel.arch == 90 ? arch == 90 : arch >= kernel.arch;
}

// Shared memory that a block may have (CUDA C++ Programming Guide, table "Technical specifications").
constexpr int max_shared(int arch) {
  if (arch == 80 || arch == 87) return 163 * 1024;
  return arch == 86 || arch == 89 || arch >= 120 ? 99 * 1024 : 227 * 1024;
}

// A rough count of cycles. A multiprocessor computes its tiles one after the other, and a part of a tile costs as much
// as a whole one, so small tiles win where large ones would leave multiprocessors idle. Each block of k is bound by the
// tensor cores or by what the L2 delivers: some 32 bytes a cycle while all are reading, up to 64 for one of few. k in
// bytes: halves are multiplied at half the rate of int8.
template <class Kernel>
inline double cycles(const Kernel& kernel, int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const int64_t tiles = divide_up(m, kernel.bm * kernel.cluster) * divide_up(n, kernel.bn);  // of clusters
  const int64_t clusters = multiprocessors / kernel.cluster, busy = tiles < clusters ? tiles : clusters;
  const double share = 32.0 * static_cast<double>(clusters) / static_cast<double>(busy);
  const double products_per_cycle = kernel.arch >= 90 ? 4096 : 2048, bytes_per_cycle = share < 64 ? share : 64;
  const double compute = kernel.bm * kernel.bn / products_per_cycle;
  const double load = (kernel.bm + kernel.bn / kernel.cluster) / bytes_per_cycle;
  const auto k_pad = static_cast<double>(divide_up(k, kernel.bk) * kernel.bk);
  return static_cast<double>(divide_up(tiles, clusters)) * k_pad * (compute > load ? compute : load);
}

}  // namespace pycompress::gpu
