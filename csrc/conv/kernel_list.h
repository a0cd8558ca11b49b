// What each instruction-set file exports: its kernels, and nothing else.
#pragma once

#include "conv.h"

namespace pycompress::conv {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
extern const Kernel kAvx512;

// AVX2 code that the AVX-512 kernel uses too.
void reorder_avx2(const uint8_t* row, int8::ActivationShape shape, uint8_t* data);
void transpose_avx2(const void* from, int64_t ld, int rows, int columns, size_t size, void* to, int64_t stride);
#endif

}  // namespace pycompress::conv
