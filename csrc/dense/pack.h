// Float matrices [n, k] as panels, float [panels][k][kPanel], zeros behind the last channel; and back.
#pragma once

#include <vector>

#include "gemm.h"

namespace pycompress::dense {

std::vector<float> pack(const float* matrix, int64_t n, int64_t k);
void unpack(const float* panels, int64_t n, int64_t k, float* matrix);

}  // namespace pycompress::dense
