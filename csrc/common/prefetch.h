// Results that are fetched while their sums are computed.
#pragma once

#include <cstdint>

namespace pycompress {

// `rows` rows of `length` bytes, `stride` bytes apart: too far for the hardware to see that they come, and a store that
// misses stalls the next one. length 1: the line where each begins.
inline void prefetch_rows(const uint8_t* y, int rows, int64_t stride, int64_t length) {
  for (int m = 0; m < rows; ++m)
    for (int64_t byte = 0; byte < length; byte += 64) __builtin_prefetch(y + m * stride + byte, 1);
}

}  // namespace pycompress
