// The kernels that were compiled; block.cpp has them in order.
#pragma once

#include "kernel.h"

namespace pycompress::block {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2, kAvx512;
#endif

}  // namespace pycompress::block
