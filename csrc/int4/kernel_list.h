// The kernels that were compiled; gemm.cpp has them in order.
#pragma once

#include "gemm.h"

namespace pycompress::int4 {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
extern const Kernel kAvxVnni;
extern const Kernel kAvx512Vnni;

// AVX2 code that the VNNI kernels use too: every processor that runs them has AVX2.
void expand_avx2(const Panel& panel, const Expanded& to);
void finish_avx2(const float* v, int rows, int columns, const Epilogue& epilogue, void* y, ptrdiff_t ldy);
#endif

}  // namespace pycompress::int4
