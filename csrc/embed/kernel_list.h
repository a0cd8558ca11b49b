// The kernels that were compiled; embed.cpp has them in order.
#pragma once

#include "embed.h"

namespace pycompress::embed {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
#endif

}  // namespace pycompress::embed
