// Checks that carry values: `check(k == 4, "int8_pack: k is ", k, ", expected 4")`.
#pragma once

#include <sstream>
#include <stdexcept>

namespace pycompress {

// Becomes ValueError in Python.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace pycompress
