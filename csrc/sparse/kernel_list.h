// The kernels of each instruction-set file.
#pragma once

#include "gemm.h"

namespace pycompress::sparse {

extern const Kernel kScalarRows, kScalarPanels, kScalarQuads, kScalarQuads4;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2Rows, kAvx2Panels, kAvx2Quads, kAvx2Quads4;
#endif

}  // namespace pycompress::sparse
