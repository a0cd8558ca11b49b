// Whole units of something.
#pragma once

#include <cstdint>

namespace pycompress {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T round_up(T value, T unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace pycompress
