// Which tiles of a block sparse product a persistent block of threads computes, in plain C++ that host tests run.
//
// Rows of blocks have unequal work. Their tiles are dealt in descending order, each other round backwards, so that who
// had the heaviest gets the lightest. So that x is read from the L2 and not from memory again for each row of blocks,
// tiles come in groups of as many rows of x as fit there.
#pragma once

#include <cstdint>

#include "../../common/host_device.h"

namespace pycompress::sparse::cuda::blocks {

struct Schedule {
  int parts, tiles_m, group;  // rows of blocks; tiles of rows of x, and how many of them come together

  PYCOMPRESS_HOST_DEVICE int64_t count() const { return static_cast<int64_t>(parts) * tiles_m; }

  struct Tile {
    int rank, m;  // which of the rows of blocks in descending order, which tile of rows of x
  };
  PYCOMPRESS_HOST_DEVICE Tile tile(int64_t i) const {
    const auto first = static_cast<int>(i / (static_cast<int64_t>(parts) * group)) * group;
    const int rest = tiles_m - first, height = rest < group ? rest : group;
    const auto inside = static_cast<int>(i - static_cast<int64_t>(first) * parts);
    return {inside / height, first + inside % height};
  }

  // f(tile) for the tiles of block `mine` of `blocks`.
  template <class F>
  PYCOMPRESS_HOST_DEVICE void for_each(int64_t mine, int64_t blocks, F&& f) const {
    for (int64_t first = 0, round = 0; first < count(); first += blocks, ++round) {
      const int64_t i = first + (round % 2 == 0 ? mine : blocks - 1 - mine);
      if (i < count()) f(tile(i));
    }
  }
};

}  // namespace pycompress::sparse::cuda::blocks
