// The kernels that were compiled; pool.cpp has them in order.
#pragma once

#include "pool.h"

namespace pycompress::pool {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
#endif

}  // namespace pycompress::pool
