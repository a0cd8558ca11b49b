#include "pack.h"

#include "../common/round.h"

namespace pycompress::dense {

std::vector<float> pack(const float* matrix, int64_t n, int64_t k) {
  std::vector<float> panels(static_cast<size_t>(round_up<int64_t>(n, kPanel) * k));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      panels[static_cast<size_t>((row / kPanel * k + i) * kPanel + row % kPanel)] = matrix[row * k + i];
  return panels;
}

void unpack(const float* panels, int64_t n, int64_t k, float* matrix) {
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) matrix[row * k + i] = panels[(row / kPanel * k + i) * kPanel + row % kPanel];
}

}  // namespace pycompress::dense
