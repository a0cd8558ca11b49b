// The kernels that were compiled; gemm.cpp has them in order.
#pragma once

#include "gemm.h"

namespace pycompress::dense {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
#endif

}  // namespace pycompress::dense
