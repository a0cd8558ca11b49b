// The kernels that were compiled; recurrent.cpp has them in order.
#pragma once

#include "recurrent.h"

namespace pycompress::recurrent {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
extern const Kernel kAvx512;
#endif

}  // namespace pycompress::recurrent
