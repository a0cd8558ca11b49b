// What each instruction-set file exports: its kernels, and nothing else.
#pragma once

#include "gemm.h"

namespace pycompress::int8 {

extern const Kernel kScalar;
#if defined(PYCOMPRESS_X86)
extern const Kernel kAvx2;
extern const Kernel kAvx2Windows;
extern const Kernel kAvxVnni;
extern const Kernel kAvx512Vnni;
extern const Kernel kAmx;

// AVX2 code that the VNNI kernels use too: every processor that runs them has AVX2.
void quantize_avx2(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax,
                   const Range* range, uint8_t* data, float* scale, int32_t* zero_point);
void finish_avx2(const int32_t* c, int nr, int rows, int columns, const Epilogue& epilogue, void* y, ptrdiff_t ldy);
// AVX-512 code of the same: what avx512vnni.cpp uses.
void quantize_avx512(const void* x, Type type, ptrdiff_t ldx, int rows, ActivationShape shape, int amax,
                     const Range* range, uint8_t* data, float* scale, int32_t* zero_point);
// The tiles of avx512vnni.cpp, for rows <= 12.
void tile_avx512_vnni(const uint8_t* a, ptrdiff_t lda, int rows, const void* panel, int length, int32_t* c,
                      bool accumulate);
void finish_avx512(const int32_t* c, int nr, int rows, int columns, const Epilogue& epilogue, void* y, ptrdiff_t ldy);
#endif

}  // namespace pycompress::int8
